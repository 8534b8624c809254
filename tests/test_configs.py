"""Every file under conf composes, builds and says what the others need to know."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from archs.base import SequenceModel
from archs.implementations import resolve_implementations
from archs.ops import OPERATIONS
from harness.config.build import build_model, checked_job, resolve
from harness.config.compose import compose_config
from harness.config.match import MATCH_TOLERANCE, matched_model_config
from harness.config.schema import parse_job
from harness.record.schema import content_hash
from harness.run.cost_card import meta_model
from tests.conftest import TRAINED, compose_resolved, is_pretrained

CONF = Path(__file__).resolve().parent.parent / "conf"


GOLDENS = CONF.parent / "tests" / "goldens"


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


#: The project's own; those of papers begin with their number and have tests/test_published_sizes.py.
SMALL_SIZES = [size for size in names("size") if not size[0].isdigit()]


#: The checkpoint that stands for the path of an entry that needs one.
CHECKPOINTS = {"pretrained": "llama", "huggingface": "mamba2"}


def compose(*overrides: str) -> dict[str, Any]:
    needed = []
    for arch in (override[5:] for override in overrides if override.startswith("arch=")):
        if is_pretrained(arch):
            needed = [f"arch.path={GOLDENS / CHECKPOINTS[arch]}", "data.vocab_size=96"]
    return compose_resolved(*overrides, *needed)


@pytest.fixture(scope="module")
def architectures() -> dict[str, dict[str, Any]]:
    return {name: compose(f"arch={name}")["arch"] for name in names("arch")}


def test_the_architectures_of_the_project_are_there() -> None:
    assert {
        *("transformer", "transformer_conv", "transformer_squared", "mamba", "mamba2", "recurrent", "hybrid"),
        *("ttt_linear", "ttt_mlp", "titans_lmm", "titans_mac", "titans_mag", "titans_mal"),
        *("gated_deltanet", "sliding_window"),
    } <= set(names("arch"))


def test_an_architecture_has_one_name_and_one_colour(architectures: dict[str, dict[str, Any]]) -> None:
    for name, arch in architectures.items():
        assert arch["name"] == (CHECKPOINTS[name] if is_pretrained(name) else name)
        assert re.fullmatch("#[0-9a-f]{6}", arch["colour"]), name
        assert (arch["learning_rate"] is None) == is_pretrained(name)
        assert is_pretrained(name) or 1e-5 < arch["learning_rate"] < 1e-1
    for key in ("colour", "display_name"):
        values = [arch[key] for arch in architectures.values()]
        assert len(set(values)) == len(values), f"two architectures share a {key}"


def test_what_has_a_short_convolution_says_so(architectures: dict[str, dict[str, Any]]) -> None:
    for name, arch in architectures.items():
        widths = re.findall(r"'conv_width': (\d+)", str(arch["model"]))
        has_one = any(int(width) > 1 for width in widths)
        assert arch["has_short_convolution"] == (None if is_pretrained(name) else has_one), name


@pytest.mark.parametrize("arch", names("arch"))
def test_an_architecture_can_be_built_from_its_file(arch: str) -> None:
    checked_job(compose(f"arch={arch}"))


@pytest.mark.parametrize("arch", TRAINED)
@pytest.mark.parametrize("size", SMALL_SIZES)
def test_parameters_are_matched(arch: str, size: str) -> None:
    config = compose(f"arch={arch}", f"size={size}")
    model_config, mismatch = matched_model_config(parse_job(config))
    reference = build_model(config["reference"]["model"], "meta").num_parameters
    if config["arch"]["match"] is None:
        is_reference = model_config == config["reference"]["model"]
        assert (mismatch is None) == is_reference and model_config == config["arch"]["model"]
    else:
        assert mismatch is not None and abs(mismatch) <= MATCH_TOLERANCE
        if config["arch"]["match"]["key"] == "d_ff":
            assert model_config["d_ff"] >= 8, "too little is left for the feed-forward"
    assert build_model(model_config, "meta").num_parameters == pytest.approx(reference, rel=MATCH_TOLERANCE)


def test_matching_takes_the_nearest_width() -> None:
    config = compose("arch=recurrent", "size=tiny")
    model_config, mismatch = matched_model_config(parse_job(config))
    assert mismatch is not None
    reference = build_model(config["reference"]["model"], "meta").num_parameters
    for step in (-2, 2):
        other = {**model_config, "d_ff": model_config["d_ff"] + step}
        assert abs(build_model(other, "meta").num_parameters / reference - 1) >= abs(mismatch)
    assert matched_model_config(parse_job(compose("arch=recurrent", "match=none")))[1] is None


def test_a_size_that_cannot_be_matched_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"d_ff=1000 of arch=recurrent.*match=none"):
        matched_model_config(parse_job(compose("arch=recurrent", "arch.match.step=1000")))


def test_every_choice_of_an_implementation_is_checked() -> None:
    assert {operation.name for operation in OPERATIONS} == set(compose()["implementation"])


@pytest.mark.parametrize("data", names("data"))
def test_data_can_be_built_from_its_file(data: str) -> None:
    path = ["data.path=somewhere"] if data in ("code_and_books", "huggingface", "text_folder") else []
    checked_job(compose(f"data={data}", *path))


@pytest.mark.parametrize("task", names("task"))
def test_a_task_can_be_chosen_alone_or_in_a_list(task: str) -> None:
    for override in (f"task={task}", f"task=[{task}]"):
        config = compose(override)
        checked_job(config)
        assert list(config["tasks"]) == [task]
    assert compose("task=[]")["tasks"] == {}


@pytest.mark.parametrize("experiment", names("experiment"))
def test_an_experiment_composes(experiment: str) -> None:
    config = compose(f"experiment={experiment}")
    assert config["experiment_name"] == experiment
    assert config["output"] == f"outputs/{experiment}"
    assert all((CONF / "arch" / f"{name}.yaml").is_file() for name in config["archs"])
    checked_job(config)


#: Not in the defaults of `make bench`: they join the others when the published records are measured anew.
NOT_YET_PUBLISHED = {"gated_deltanet", "sliding_window"}


@pytest.mark.parametrize(
    "arch",
    ["transformer", "transformer_conv", "sliding_window", "hybrid", "titans_mag", "titans_mal", "pretrained"],
)
def test_a_graphs_attention_is_chosen_apart_or_as_attention_is(
    arch: str, new_model: Callable[..., SequenceModel]
) -> None:
    for override, expected in {"attention": ("plain", "plain"), "attention_step": ("sdpa", "plain")}.items():
        model = new_model(arch, f"implementation.{override}=plain")
        used = resolve_implementations(model, torch.device("cpu"))
        assert (used["attention"], used["attention_step"]) == expected


def test_the_experiments_measure_every_architecture() -> None:
    for experiment in ("smoke", "h200_latency", "h200_quality"):
        assert set(compose(f"experiment={experiment}")["archs"]) == set(TRAINED)
    for experiment in ("cpu_small", "gpu_small"):
        assert set(compose(f"experiment={experiment}")["archs"]) == set(TRAINED) - NOT_YET_PUBLISHED


def test_an_override_holds_over_an_experiment() -> None:
    config = compose("experiment=smoke", "size=tiny", "train.num_steps=7")
    assert config["size"]["name"] == "tiny" and config["train"]["stream"]["num_steps"] == 7


def test_the_same_command_composes_the_same_configuration() -> None:
    command = ["experiment=cpu_small", "arch=mamba"]
    first, second = (content_hash(resolve(compose_config(command))) for _ in range(2))
    assert first == second != content_hash(compose(*command, "seed=1"))


def test_all_are_trained_alike(architectures: dict[str, dict[str, Any]]) -> None:
    """Only the learning rate is an architecture's own."""
    streams = [compose(f"arch={name}")["train"] for name in architectures]
    assert all(train == streams[0] for train in streams)


@pytest.mark.parametrize("arch", names("arch"))
def test_the_meta_device_is_enough_for_counting(arch: str) -> None:
    if arch == "huggingface":
        pytest.importorskip("transformers", reason="needs the extra `huggingface`")
    model, _ = meta_model(parse_job(compose(f"arch={arch}", "size=nano", "match=none", "dtype=bfloat16")))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.state_bytes_at(1, 1 << 20) >= model.state_bytes_at(1, 1 << 10) > 0
