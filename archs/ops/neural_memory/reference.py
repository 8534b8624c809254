"""The neural memory as defined: one token at a time, its gradient by automatic differentiation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops.neural_memory import NeuralMemoryState


def _apply(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """M(x): (B, H, K) -> (B, H, K_v)."""
    for layer, w in enumerate(weights):
        x = torch.einsum("bhi,bhio->bho", x if layer == 0 else F.silu(x), w)
    return x


def _loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
    """Eq. 12. The sum over rows and heads: each has weights of its own."""
    return (_apply(weights, k) - v).square().sum()


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    step_size: Tensor,
    momentum: Tensor,
    state: NeuralMemoryState,
    position: int,
    *,
    chunk_tokens: int,
) -> tuple[Tensor, NeuralMemoryState]:
    """See archs.ops.neural_memory.neural_memory."""
    start, weights, updates = state
    outputs = []
    for t in range(q.shape[1]):
        if (position + t) % chunk_tokens == 0:
            start = weights
        gradients = torch.func.grad(_loss)(start, k[:, t], v[:, t])
        keep, step, mass = ((g[:, t, :, None, None]) for g in (1 - decay, step_size, momentum))
        updates = tuple(mass * s - step * g for s, g in zip(updates, gradients, strict=True))
        weights = tuple(keep * w + s for w, s in zip(weights, updates, strict=True))
        outputs.append(_apply(weights, q[:, t]))
    return torch.stack(outputs, dim=1), NeuralMemoryState(start, weights, updates)
