"""State-space duality as defined, one token at a time. Glossary in archs/ops/ssd."""

from __future__ import annotations

import torch
from torch import Tensor

from archs.ops.precision import accumulation_dtype


def _update(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, H, P), dt (B, H), A (H,), B, C (B, G, N), h (B, H, P, N) -> h' C (B, H, P) and the new h'."""
    heads_per_group = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(heads_per_group, dim=1), C.repeat_interleave(heads_per_group, dim=1)
    decay = torch.exp(dt * A)[:, :, None, None]
    h = decay * h + (dt[:, :, None] * x)[..., None] * B[:, :, None, :]
    return torch.einsum("bhpn,bhn->bhp", h, C), h


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    *,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """See archs.ops.ssd.ssd; there are no chunks here."""
    del chunk_tokens
    dtype = accumulation_dtype(x.dtype)
    inputs, dt, A, B, C, D = (tensor.to(dtype) for tensor in (x, dt, A, B, C, D))
    if initial_state is None:
        h = inputs.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    else:
        h = initial_state.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        y, h = _update(inputs[:, t], dt[:, t], A, B[:, t], C[:, t], h)
        outputs.append(y + D[:, None] * inputs[:, t])
    return torch.stack(outputs, dim=1).to(x.dtype), h


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """See archs.ops.ssd.ssd_step."""
    inputs, dt, A, B, C, D = (tensor.to(state.dtype) for tensor in (x, dt, A, B, C, D))
    y, h = _update(inputs, dt, A, B, C, state)
    state.copy_(h)
    return (y + D[:, None] * inputs).to(x.dtype)
