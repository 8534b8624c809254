"""The neural memory a chunk at a time: cuts a call at the chunks' ends and joins the results."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from archs.ops.neural_memory import NeuralMemoryState
from archs.ops.neural_memory.chunk import Weights, chunk, coefficients_of, single_step
from archs.ops.neural_memory.forward import forward
from archs.ops.neural_memory.scan import scan

# A longer sequence keeps, for the backward pass, the weights of one chunk in so many only.
CHECKPOINT_CHUNKS = 64


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], weights: Weights, updates: Weights
) -> tuple[Tensor, Weights, Weights]:
    """Whole chunks, tokens (m, n, b, K) and gates (m, n, b) with the chunks first."""
    run = scan if torch.is_grad_enabled() else forward
    return run(q, k, v, coefficients_of(*gates), weights, updates)


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
    """See archs.ops.neural_memory.neural_memory. Memory beside the state is linear in T."""
    batch_size, num_tokens, num_heads = decay.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (n, T, K)
    gates = tuple(g.transpose(1, 2).flatten(0, 1) for g in (decay, step_size, momentum))  # (n, T)
    start, weights, updates = (tuple(w.flatten(0, 1) for w in part) for part in state)
    outputs = []

    def part(first: int, last: int) -> None:
        """Tokens of one chunk that begins before this call or ends after it."""
        nonlocal weights, updates
        tokens = tuple(t[:, first:last] for t in (q, k, v))
        some_gates = tuple(g[:, first:last] for g in gates)
        if last - first == 1:
            y, weights, updates = single_step(*tokens, some_gates, start, weights, updates)
        else:
            y, weights, updates = chunk(*tokens, coefficients_of(*some_gates), start, weights, updates)
        outputs.append(y)

    first = min(num_tokens, -position % chunk_tokens)
    if first:
        part(0, first)
    num_chunks = 0 if chunk_tokens == 1 and num_tokens == 1 else (num_tokens - first) // chunk_tokens
    group = CHECKPOINT_CHUNKS if torch.is_grad_enabled() and num_chunks > CHECKPOINT_CHUNKS else num_chunks
    for begin in range(0, num_chunks, max(1, group)):
        length = min(group, num_chunks - begin)
        span = slice(first + begin * chunk_tokens, first + (begin + length) * chunk_tokens)
        tokens = (t[:, span].unflatten(1, (length, chunk_tokens)).transpose(0, 1) for t in (q, k, v))
        some_gates = tuple(g[:, span].unflatten(1, (length, chunk_tokens)).transpose(0, 1) for g in gates)
        tokens = tuple(t.contiguous() for t in tokens)
        if group < num_chunks:
            y, weights, updates = checkpoint(
                _chunks, *tokens, some_gates, weights, updates, use_reentrant=False
            )
        else:
            y, weights, updates = _chunks(*tokens, some_gates, weights, updates)
        outputs.append(y.transpose(0, 1).flatten(1, 2))
    rest = first + num_chunks * chunk_tokens
    if rest < num_tokens:
        start = weights
        part(rest, num_tokens)
    y = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    y = y.unflatten(0, (batch_size, num_heads)).transpose(1, 2)
    shaped = (
        tuple(w.unflatten(0, (batch_size, num_heads)) for w in part_weights)
        for part_weights in (start, weights, updates)
    )
    return y, NeuralMemoryState(*shaped)
