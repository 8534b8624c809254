"""From a resolved configuration to objects; and the check of all that a job will build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hydra.utils
import torch
from torch.overrides import TorchFunctionMode

from archs.base import SequenceModel
from archs.implementations import check_implementations
from harness.config.check_experts import check_experts
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
    if config.arch.expert_training is not None:  # first: the architecture's own tasks may refer to it
        check_experts(values["arch"], values["reference"])
    for name, task in config.arch.tasks.items():
        check_targets(task, f"arch.tasks.{name}")
    return config


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
