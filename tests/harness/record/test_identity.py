"""Two results are the same where their numbers depend on the same, wherever classes stand and jobs run."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from harness.record.identity import (
    UNKNOWN_DATA,
    counted_identity,
    is_same,
    stable_hash,
    timed_identity,
    trained_identity,
)

ENVIRONMENT = {"device": "cpu", "cpu_name": "Example CPU", "gpu_name": None, "num_threads": 2}
CONFIG: dict[str, Any] = {
    "arch": {
        "name": "mamba",
        "display_name": "Mamba",
        "colour": "#000000",
        "learning_rate": 1e-3,
        "match": {"key": "d_model", "step": 8},
        "model": {
            "_target_": "archs.decoder.Decoder",
            "d_model": 64,
            "mixers": [{"_target_": "archs.mamba.M"}],
        },
    },
    "reference": {"model": {"_target_": "archs.decoder.Decoder", "d_model": 48}},
    "size": {"name": "tiny"},
    "match": "parameters",
    "train": {
        "name": "default",
        "num_steps": 10,
        "checkpoint_interval_s": 30,
        "search": False,
        "search_grid": [1e-3],
        "stream": {"_target_": "tasks.data.stream.Stream", "batch_tokens": 64},
    },
    "tasks": {"needle": {"num_examples": 20}, "latency": {"num_samples": 5}},
    "seed": 0,
    "dtype": "float32",
    "num_threads": None,
    "num_workers": 1,
    "output": "outputs/a",
    "experiment_name": "a",
}


def changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *folders, key = path.split(".")
    node: Any = config
    for folder in folders:
        node = node[folder]
    node[key] = value
    return config


def trained(config: dict[str, Any], data: str | None = "d1", device: str = "cpu") -> str:
    return trained_identity(config, config["arch"], config["tasks"]["needle"], device=device, data=data)


def timed(config: dict[str, Any], **environment: Any) -> str:
    settings = config["tasks"]["latency"]
    return timed_identity(config, config["arch"], "latency", settings, environment=ENVIRONMENT | environment)


NOTHING = [
    ("output", "elsewhere"),
    ("experiment_name", "b"),
    ("num_workers", 4),
    ("num_threads", 8),
    ("tasks.perplexity", {"num_documents": 4}),
    ("arch.display_name", "M"),
    ("arch.colour", "#ffffff"),
    ("arch.tasks", {"adaptation": {}}),
    ("arch.model._target_", "archs.moved.Decoder"),
    ("train.search_grid", [1e-2]),
    ("train.checkpoint_interval_s", 5),
    ("train.name", "other"),
]


@pytest.mark.parametrize(("path", "value"), NOTHING)
def test_what_decides_no_number_changes_no_identity(path: str, value: Any) -> None:
    assert trained(changed(path, value)) == trained(CONFIG)
    assert timed(changed(path, value)) == timed(CONFIG)


@pytest.mark.parametrize(
    ("path", "value", "is_timed", "is_counted"),
    [
        ("arch.model.d_model", 128, True, True),
        ("arch.model._target_", "archs.decoder.Other", True, True),
        ("arch.model._target_", "plugin.decoder.Decoder", True, True),
        ("reference.model.d_model", 96, True, True),
        ("match", "none", True, True),
        ("dtype", "bfloat16", True, True),
        ("train.num_steps", 20, False, False),
        ("train.search", True, False, False),
        ("train.peak_learning_rate", 1e-2, False, False),
        ("arch.learning_rate", 1e-2, False, False),
        ("arch.post_training", {"method": "reinforce"}, False, False),
        ("seed", 1, False, False),
        ("tasks.needle.num_examples", 40, False, False),
    ],
)
def test_what_decides_a_trained_models_numbers(
    path: str, value: Any, is_timed: bool, is_counted: bool
) -> None:
    other = changed(path, value)
    assert trained(other) != trained(CONFIG)
    assert (timed(other) != timed(CONFIG)) == is_timed
    assert (counted_identity(other, other["arch"]) != counted_identity(CONFIG, CONFIG["arch"])) == is_counted


def test_quality_depends_on_the_device_and_the_data() -> None:
    assert len({trained(CONFIG), trained(CONFIG, device="cuda"), trained(CONFIG, data="d2")}) == 3


@pytest.mark.parametrize("change", [{"num_threads": 1}, {"cpu_name": "Other"}, {"device": "cuda"}])
def test_times_depend_on_the_machine(change: dict[str, Any]) -> None:
    assert timed(CONFIG, **change) != timed(CONFIG)


def test_times_on_a_gpu_depend_on_the_packages_that_bring_kernels() -> None:
    packages = {"triton": "3.0", "numpy": "2.0"}
    on_gpu = timed(CONFIG, device="cuda", packages=packages)
    assert timed(CONFIG, device="cuda", packages=packages | {"numpy": "2.1"}) == on_gpu
    assert timed(CONFIG, device="cuda", packages=packages | {"triton": "3.1"}) != on_gpu


def test_unknown_data_may_be_any() -> None:
    unknown = trained(CONFIG, data=None)
    assert f":{UNKNOWN_DATA}:" in unknown
    assert is_same(unknown, trained(CONFIG, data="d1")) and is_same(trained(CONFIG, data="d2"), unknown)
    assert not is_same(trained(CONFIG, data="d1"), trained(CONFIG, data="d2"))
    assert not is_same(unknown, trained(changed("seed", 1), data="d1"))


def test_a_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert stable_hash({"a": 1, "b": [1, {"c": 2}]}) == stable_hash({"b": [1, {"c": 2}], "a": 1})
