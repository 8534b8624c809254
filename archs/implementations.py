"""Which implementation each operation of a model runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from archs.ops import OPERATIONS
from archs.ops.operation import Operation


def check_implementations(chosen: Mapping[str, str]) -> None:
    """Raise ImplementationUnavailable with one sentence where `chosen`, operation -> implementation, holds an
    unknown name, whether or not a model uses it. `resolve_implementations` finds out whether it can run."""
    for operation in OPERATIONS:
        operation.check_name(chosen.get(operation.name, "auto"))


def resolve_implementations(model: nn.Module, device: torch.device) -> dict[str, str]:
    """Fix, once, the implementation of every operation in `model`: `auto` becomes a name.

    A module that calls one, a Mixer or a part of it, has `operation` and `implementation`, and may have those
    of a step (see Mixer). Returns operation -> name. Raises ImplementationUnavailable with one sentence."""
    names = {}
    for module in model.modules():
        for prefix in ("", "step_"):
            operation = getattr(module, f"{prefix}operation", None)
            name = getattr(module, f"{prefix}implementation", None)
            if isinstance(operation, Operation) and name is not None:
                names[operation.name] = operation.resolve(name, device)
                setattr(module, f"{prefix}implementation", names[operation.name])
    return names
