"""From a composed configuration to objects: validation, parameter matching, hashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hydra.utils
import torch
from torch.overrides import TorchFunctionMode

from archs.base import SequenceModel
from harness.config.compose import resolve as resolve
from harness.config.schema import check_targets

#: What fills a tensor with random numbers, beside torch.nn.init.
DRAWN = (torch.Tensor.normal_, torch.Tensor.uniform_)


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
