"""From a composed configuration to objects: validation, parameter matching, hashes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from torch.overrides import TorchFunctionMode

from archs.base import SequenceModel, check_implementations
from harness.check import check_call, check_root, check_targets, check_values
from harness.check_experts import check_experts
from harness.config_dir import CONFIG_DIR, check_model_overrides, register_resolvers
from harness.config_dir import resolve as resolve
from harness.record import content_hash
from harness.train import Training

#: Settings of conf/train that are not the trainer's own.
NOT_TRAINER_KEYS = ("name", "stream", "search", "search_grid", "by_size", "peak_learning_rate")

#: What fills a tensor with random numbers, beside torch.nn.init.
DRAWN = (torch.Tensor.normal_, torch.Tensor.uniform_)

#: The relative difference in parameters that `match=parameters` must stay below.
MATCH_TOLERANCE = 0.02


def compose_config(overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """The configuration that the command line `python -m harness *overrides` composes.

    config_dir: a further folder of YAML files, as --config-dir gives.
    Raises ValueError where an override of a model changes nothing; see check_model_overrides.
    """
    register_resolvers()
    GlobalHydra.instance().clear()
    if config_dir is not None:
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        config = compose("config", overrides)
    check_model_overrides(config, overrides)
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """Everything that a job will build, before it builds any of it.

    Raises ValueError with one sentence that names the mistake and the valid choices."""
    check_root(config)
    check_implementations(config["implementation"])
    check_targets(config["arch"]["model"], "arch.model")
    check_targets(config["reference"]["model"], "reference.model")
    for name, task in config["tasks"].items():
        check_targets(task, f"tasks.{name}")
    check_targets(config["data"]["corpus"], "data.corpus")
    num_tokens = config["data"]["vocab_size"]
    num_rows = config["arch"]["model"].get("vocab_size", num_tokens)
    if num_tokens > num_rows:
        raise ValueError(
            f"data.vocab_size={num_tokens} is more than the {num_rows} tokens of "
            f"arch={config['arch']['name']} at size={config['size']['name']}; choose another."
        )
    train = config["train"]
    settings = {key: value for key, value in train.items() if key not in NOT_TRAINER_KEYS}
    if "learning_rate" in settings:
        raise ValueError("train.learning_rate is not a setting: the rate is arch.learning_rate.")
    check_call(Training, settings, "train", "harness.train.Training", is_partial=True)
    check_values(train, {"search": bool, "search_grid": list[float]}, "train")
    if train["search"] and not train["search_grid"]:
        raise ValueError("train.search_grid=[] must hold at least one learning rate; or train.search=false.")
    check_values(train, {"peak_learning_rate": float, "by_size": dict[str, Any]}, "train")
    rates = train["search_grid"] if train["search"] else [peak_rate(config)]
    for rate in [] if config["arch"].get("is_pretrained") else rates:
        training_settings(config, rate)
    check_targets({**train["stream"], "_partial_": True}, "train.stream")  # the corpus is added later
    if config["arch"].get("expert_training") is not None:  # first: the arch's own tasks may refer to it
        check_experts(config["arch"], config["reference"])
    for name, task in config["arch"].get("tasks", {}).items():
        check_targets(task, f"arch.tasks.{name}")


def peak_rate(config: Mapping[str, Any]) -> float:
    """The learning rate to train at without a search: the recipe's, where it has one, else the
    architecture's."""
    rate: float = config["train"].get("peak_learning_rate", config["arch"]["learning_rate"])
    return rate


def training_settings(config: Mapping[str, Any], learning_rate: float) -> Training:
    """The trainer's settings at one learning rate; raises ValueError where one is out of its range."""
    settings = {key: value for key, value in config["train"].items() if key not in NOT_TRAINER_KEYS}
    return Training(**{**settings, "betas": tuple(settings["betas"])}, learning_rate=learning_rate)


def build_model(model_config: Mapping[str, Any], device: str | torch.device = "cpu") -> SequenceModel:
    """Instantiates a model from its resolved configuration on `device` ("meta" costs nothing)."""
    check_targets(model_config, "arch.model")
    with _NothingDrawnOnMeta(), torch.device(device):
        return instantiate(model_config)


class _NothingDrawnOnMeta(TorchFunctionMode):
    """Leaves out what would fill tensors without content: torch imports its compiler for it, which takes
    seconds."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        is_drawn = function in DRAWN or getattr(function, "__module__", None) == "torch.nn.init"
        return tensor if is_drawn and tensor.is_meta else function(*args, **kwargs)


def instantiate(node: Mapping[str, Any]) -> Any:
    """Hydra's instantiate, with the constructor's own error raised as it was."""
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except hydra.errors.InstantiationException as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise


def matched_model_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """The model's configuration after `match`, and the remaining relative mismatch in parameters
    against the reference (None for the reference itself, and with match=none).

    An architecture's `match` names the key whose value is solved (`d_ff` or `d_model`) and the
    step it moves in; one without it, and a published model, are compared as they are, and `mismatch_text`
    says how far off they are.
    Raises ValueError where no value of the key comes within MATCH_TOLERANCE."""
    model_config, rule = dict(config["arch"]["model"]), config["arch"]["match"]
    if config["match"] == "none" or model_config == config["reference"]["model"]:
        return model_config, None
    target = build_model(config["reference"]["model"], "meta").num_parameters
    if rule is None or is_published(config):
        return model_config, build_model(model_config, "meta").num_parameters / target - 1

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


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether the size is one that the architecture's `published` names: it is that published model there,
    and no width of it is solved."""
    return config["size"]["name"] in config["arch"].get("published", ())


def mismatch_text(mismatch: float, *, is_published: bool = False) -> str:
    """The mismatch in words. Beyond MATCH_TOLERANCE it is that of a published model, or of an architecture
    whose `match` is null: Transformer², say, has its experts beside the base's widths by design."""
    text = f"parameters {mismatch:+.2%} against the reference"
    if is_published:
        return f"{text}; published as it is, and nothing is matched."
    if abs(mismatch) <= MATCH_TOLERANCE:
        return f"{text}."
    return f"{text}; more than {MATCH_TOLERANCE:.0%}, and left so, for arch.match is null."


def _nearest(count: Callable[[int], int], target: int, step: int, start: int) -> int:
    """The multiple of `step` whose count is nearest to `target`; counts grow with the value, nearly
    evenly, so that the chord between the bounds leads near it in a few counts."""
    counts = functools.cache(count)
    low, high = step, max(step, start // step * step)
    while counts(high) < target:
        low, high = high, 2 * high
    while high - low > step:
        share = (target - counts(low)) / max(1, counts(high) - counts(low))
        chord = low + round(share * (high - low) / step) * step
        for value in (min(max(chord, low + step), high - step), chord + step, chord - step):
            if low < value < high:
                low, high = (value, high) if counts(value) < target else (low, value)
    return min((low, high), key=lambda value: abs(counts(value) - target))


def training_hash(
    config: Mapping[str, Any], model_config: Mapping[str, Any], learning_rate: float, data_hash: str
) -> str:
    """What decides a trained model: its name in the checkpoint folder."""
    ignored = ("name", "search", "search_grid", "by_size", "peak_learning_rate", "checkpoint_interval_s")
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
