"""From a composed configuration to objects: validation, parameter matching, hashes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from archs.base import SequenceModel
from harness.config_dir import CONFIG_DIR, register_resolvers, unknown
from harness.record import content_hash

#: The relative difference in parameters that `match=parameters` must stay below.
MATCH_TOLERANCE = 0.02


def compose_config(overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """The configuration that the command line `python -m harness *overrides` composes.

    config_dir: a further folder of YAML files, as --config-dir gives.
    """
    register_resolvers()
    GlobalHydra.instance().clear()
    if config_dir is not None:
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose("config", overrides)


def resolve(config: DictConfig) -> dict[str, Any]:
    """Plain, fully interpolated data; raises ValueError naming an unresolved interpolation."""
    value = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(value, dict)
    return {str(key): item for key, item in value.items()}


def check_targets(node: Any, path: str = "") -> None:
    """Every key beside a `_target_` must be a parameter of it, and every required one be there.

    Raises ValueError with one sentence that names the mistake and the valid choices."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            _check_target(node, path)
        for key, item in node.items():
            check_targets(item, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            check_targets(item, f"{path}[{index}]")


def _check_target(node: Mapping[str, Any], path: str) -> None:
    target = str(node["_target_"])
    try:
        function = hydra.utils.get_method(target) if "." in target else None
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path}._target_={target!r} cannot be imported: {reason}.") from error
    if function is None:
        raise ValueError(f"{path}._target_={target!r} must be a dotted path such as archs.decoder.Decoder.")
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in node:
        if not str(key).startswith("_") and key not in parameters:
            raise ValueError(unknown(f"key of {path} ({target})", str(key), list(parameters)))


def build_model(model_config: Mapping[str, Any], device: str | torch.device = "cpu") -> SequenceModel:
    """Instantiates a model from its resolved configuration on `device` ("meta" costs nothing)."""
    check_targets(model_config, "arch.model")
    with torch.device(device):
        return instantiate(model_config)


def instantiate(node: Mapping[str, Any]) -> Any:
    """Hydra's instantiate, with the constructor's own ValueError raised as it was."""
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except hydra.errors.InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def matched_model_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """The model's configuration after `match`, and the remaining relative mismatch in parameters
    against the reference (None where nothing was matched).

    An architecture's `match` names the key whose value is solved (`d_ff` or `d_model`) and the
    step it moves in. Raises ValueError where no value comes within MATCH_TOLERANCE."""
    model_config, rule = dict(config["arch"]["model"]), config["arch"]["match"]
    if config["match"] == "none" or rule is None:
        return model_config, None
    target = build_model(config["reference"]["model"], "meta").num_parameters

    def count(value: int) -> int:
        return build_model({**model_config, rule["key"]: value}, "meta").num_parameters

    value = _nearest(count, target, rule["step"], model_config[rule["key"]])
    mismatch = count(value) / target - 1
    if abs(mismatch) > MATCH_TOLERANCE:
        raise ValueError(
            f"match=parameters: {rule['key']}={value} of arch={config['arch']['name']} is nearest to the "
            f"reference's {target} parameters and still {mismatch:+.1%} off; choose another size or "
            "match=none."
        )
    return {**model_config, rule["key"]: value}, mismatch


def _nearest(count: Callable[[int], int], target: int, step: int, start: int) -> int:
    """The multiple of `step` whose count is nearest to `target`; counts grow with the value."""
    low, high = step, max(step, start // step * step)
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min((low, high), key=lambda value: abs(count(value) - target))


def training_hash(
    config: Mapping[str, Any], model_config: Mapping[str, Any], learning_rate: float, data_hash: str
) -> str:
    """What decides a trained model: its name in the checkpoint folder."""
    ignored = ("name", "search", "search_grid", "checkpoint_interval_s")
    train = {key: value for key, value in config["train"].items() if key not in ignored}
    return content_hash(
        {
            "train": train,
            "seed": config["seed"],
            "dtype": config["dtype"],
            "learning_rate": learning_rate,
            "model": model_config,
            "data": data_hash,
        }
    )
