"""From a resolved configuration to objects; and the check of all that a job will build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hydra.utils
import torch
from torch.overrides import TorchFunctionMode

from archs.base import SequenceModel
from archs.implementations import check_implementations
from harness.config.compose import resolve as resolve
from harness.config.schema import JobConfig, parse_job
from harness.config.targets import check_targets

#: Methods that fill a tensor with random numbers, beside torch.nn.init.
RANDOM_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_)


def checked_job(values: Mapping[str, Any]) -> JobConfig:
    """Return the typed configuration of a job, with every class that the job will build checked.

    Imports those classes, and builds none. Raises ValueError with one sentence that names the mistake and the
    valid choices."""
    config = parse_job(values)
    check_implementations(config.implementation)
    check_targets(config.arch.model, "arch.model")
    check_targets(config.reference.model, "reference.model")
    for name, task in config.tasks.items():
        check_targets(task, f"tasks.{name}")
    check_targets(config.data.corpus, "data.corpus")
    check_targets({**config.train.stream, "_partial_": True}, "train.stream")  # the corpus is added later
    if config.arch.post_training is not None:  # first: the architecture's own tasks may refer to it
        _check_post_training(config, config.arch.post_training)
    for name, task in config.arch.tasks.items():
        check_targets(task, f"arch.tasks.{name}")
    return config


def _check_post_training(config: JobConfig, settings: Mapping[str, Any]) -> None:
    """Raise ValueError with one sentence where arch.post_training cannot be used."""
    rate, base_rate = config.arch.learning_rate, config.reference.learning_rate
    if rate != base_rate:
        raise ValueError(
            f"arch.learning_rate={rate} of arch={config.arch.name} is its base's, {base_rate}: "
            "choose the base with arch@reference and its rate with reference.learning_rate."
        )
    path = "arch.post_training"
    check_targets(settings, path)
    for key, item in settings.items():
        if isinstance(item, Mapping) and "_target_" in item:
            _construct(item, f"{path}.{key}")
    _construct(settings, path)


def _construct(node: Mapping[str, Any], path: str) -> None:
    """Raise the constructor's ValueError with the path of its setting before it."""
    try:
        instantiate(node)
    except ValueError as error:
        raise ValueError(f"{path}.{error}.") from None


def build_model(model_config: Mapping[str, Any], device: str | torch.device = "cpu") -> SequenceModel:
    """Instantiate a model from its checked configuration on `device` ("meta" costs nothing)."""
    with _NoRandomFillsOnMeta(), torch.device(device):
        return instantiate(model_config)


class _NoRandomFillsOnMeta(TorchFunctionMode):
    """Skip random fills of tensors without content: torch would import its compiler for them, which takes
    seconds."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        is_random_fill = function in RANDOM_FILLS or getattr(function, "__module__", None) == "torch.nn.init"
        return tensor if is_random_fill and tensor.is_meta else function(*args, **kwargs)


def instantiate(node: Mapping[str, Any]) -> Any:
    """Call Hydra's instantiate, and raise the constructor's own error unchanged."""
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except hydra.errors.InstantiationException as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise
