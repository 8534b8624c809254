"""The selective scan as defined, one token at a time. Glossary in archs/ops/selective_scan."""

from __future__ import annotations

import torch
from torch import Tensor

from archs.ops.precision import accumulation_dtype


def _update(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """x, dt (B, E), A (E, N), B, C (B, N), h (B, E, N) -> C h' (B, E) and the new state h'."""
    decay = torch.exp(dt[:, :, None] * A)
    h = decay * h + (dt * x)[:, :, None] * B[:, None, :]
    return torch.einsum("ben,bn->be", h, C), h


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See archs.ops.selective_scan.selective_scan."""
    dtype = accumulation_dtype(x.dtype)
    inputs, dt, A, B, C, D = (tensor.to(dtype) for tensor in (x, dt, A, B, C, D))
    if initial_state is None:
        h = inputs.new_zeros(x.shape[0], *A.shape)
    else:
        h = initial_state.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        y, h = _update(inputs[:, t], dt[:, t], A, B[:, t], C[:, t], h)
        outputs.append(y + D * inputs[:, t])
    return torch.stack(outputs, dim=1).to(x.dtype), h


def selective_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """See archs.ops.selective_scan.selective_step."""
    inputs, dt, A, B, C, D = (tensor.to(state.dtype) for tensor in (x, dt, A, B, C, D))
    y, h = _update(inputs, dt, A, B, C, state)
    state.copy_(h)
    return (y + D * inputs).to(x.dtype)
