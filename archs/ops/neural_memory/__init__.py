"""Titans' neural memory: a small network whose weights are trained on the sequence as it is read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archs.ops.operation import Implementation, Operation, triton_kernel

OPERATION = Operation(
    name="neural_memory",
    implementations={
        "reference": Implementation(target="archs.ops.neural_memory.reference:neural_memory"),
        "plain": Implementation(target="archs.ops.neural_memory.plain:neural_memory"),
        "triton": triton_kernel("archs.ops.neural_memory.kernel:neural_memory"),
    },
    auto={"cpu": ["plain"], "cuda": ["plain"]},
)


class NeuralMemoryState(NamedTuple):
    """Each a tuple with one matrix (B, H, in, out) a layer; no two share storage.

    start:    weights before the open chunk's first token, where its gradients are taken.
    weights:  weights now.
    momentum: the running update S now.
    """

    start: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]


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
    implementation: str = "auto",
) -> tuple[Tensor, NeuralMemoryState]:
    """Writes each token into the memory, then reads it (Titans, arXiv 2501.00663, eqs. 12 to 15).

    With t' the last token before token t's chunk, l(M; k, v) = |M(k) - v|^2 and M a stack of
    matrices applied as x @ W with SiLU between:

        S_t = momentum_t S_{t-1} - step_size_t grad l(M_{t'}; k_t, v_t)
        M_t = (1 - decay_t) M_{t-1} + S_t
        y_t = M_t(q_t)

    q, k (B, T, H, K), v (B, T, H, K_v), the three gates (B, T, H). `position` is the number of
    tokens already in the open chunk: a chunk ends after `chunk_tokens` tokens, wherever the calls
    are cut. Returns y (B, T, H, K_v) in q's dtype and the new state, in the state's dtype, which
    is the dtype the work is done in, under autocast too. At position 0 `state.start` is not read.

    Raises ImplementationUnavailable where the implementation cannot run, ValueError where chunk
    and position make no sense.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be positive")
    if not 0 <= position < chunk_tokens:
        raise ValueError(f"position={position} must lie in a chunk of {chunk_tokens} tokens")
    tensors = (q, k, v, decay, step_size, momentum)
    function, inputs = OPERATION.function_and_inputs(implementation, tensors, state.weights[0].dtype)
    with torch.autocast(q.device.type, enabled=False):
        y, new = function(*inputs, state, position, chunk_tokens=chunk_tokens)
    if (position + q.shape[1]) % chunk_tokens == 0:
        new = new._replace(start=tuple(w.clone() for w in new.weights))
    return y.to(q.dtype), new


def read(q: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """M(q) with fixed weights: q (B, T, H, K) and matrices (B, H, in, out) -> (B, T, H, K_v)."""
    x = q.to(weights[0].dtype).transpose(1, 2)
    with torch.autocast(q.device.type, enabled=False):
        for layer, w in enumerate(weights):
            x = x @ w if layer == 0 else (x * x.sigmoid()) @ w
    return x.transpose(1, 2).to(q.dtype)
