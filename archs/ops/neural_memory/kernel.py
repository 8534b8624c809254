"""The neural memory in Triton, forward and backward. What a program holds and what is serial: kernel_walk.

A call is two launches (coefficients of all chunks, then the walk) beside a few copies of the state, and twice
that where its last chunk stays open after a closed one. A backward pass is three launches for each walk
(coefficients again, the walk, the gates' gradients), a single token without gradients one (kernel_decode).
Their number does not depend on that of the chunks.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from archs.ops.neural_memory import NeuralMemoryState
from archs.ops.neural_memory.kernel_coefficients import coefficients_backward_kernel, coefficients_kernel
from archs.ops.neural_memory.kernel_decode import decode_kernel
from archs.ops.neural_memory.kernel_walk import backward_kernel, forward_kernel
from archs.ops.operation import ImplementationUnavailable

Weights = tuple[Tensor, ...]

#: The smallest side of a matrix product's tile.
MIN_TILE = 16

#: A chunk's (b, b) matrices are held whole.
MAX_CHUNK_TOKENS = 64


class Plan(NamedTuple):
    """What the kernels are compiled for: see kernel_tiles. widths are those of the memory's inputs and
    outputs, layer by layer, as they are; K, F, V the first, the hidden and the last one filled up."""

    widths: tuple[int, ...]
    chunk_tokens: int
    TILE: int
    precision: str

    @property
    def padded(self) -> tuple[int, ...]:
        return tuple(-(-width // self.TILE) * self.TILE for width in self.widths)

    @property
    def num_weights(self) -> int:
        widths = self.padded
        return sum(rows * columns for rows, columns in itertools.pairwise(widths))

    @property
    def num_rows(self) -> int:
        return max(MIN_TILE, triton.next_power_of_2(self.chunk_tokens))

    def array(self, num_arrays: int) -> tuple[int, ...]:
        """The shape of so many arrays."""
        return num_arrays, len(self.widths) - 1, self.num_rows, max(self.padded)

    def walk_constants(self) -> dict[str, Any]:
        """Of the kernels that walk along the chunks."""
        widths = self.padded
        return dict(
            NUM_WEIGHTS=self.num_weights,
            KEY_WIDTH=self.widths[0],
            VALUE_WIDTH=self.widths[-1],
            CHUNK=self.chunk_tokens,
            DEPTH=len(widths) - 1,
            K=widths[0],
            F=widths[1],
            V=widths[-1],
            ROWS=self.num_rows,
            WIDEST=max(widths),
            TILE=self.TILE,
            PRECISION=self.precision,
            # One stage: what a pass reads was written just before.
            num_warps=8 if self.TILE == 64 or self.num_rows > 16 else 4,
            num_stages=1,
        )

    def chunk_constants(self) -> dict[str, Any]:
        """Of the kernels of the coefficients."""
        return dict(
            CHUNK=self.chunk_tokens,
            ROWS=self.num_rows,
            PRECISION=self.precision,
            num_warps=8 if self.num_rows > 16 else 4,
            num_stages=1,
        )


def plan_of(state: NeuralMemoryState, chunk_tokens: int, dtype: torch.dtype) -> Plan:
    """Raises ImplementationUnavailable for what the kernels do not do."""
    widths = (state.weights[0].shape[2], *(w.shape[3] for w in state.weights))
    why = None
    if state.weights[0].dtype != torch.float32:
        why = f"keeps its state in float32 only, not in {state.weights[0].dtype}"
    elif chunk_tokens > MAX_CHUNK_TOKENS:
        why = f"takes chunks of up to {MAX_CHUNK_TOKENS} tokens, not of {chunk_tokens}"
    elif len(set(widths[1:-1])) > 1:
        why = f"needs hidden layers of one width, not of {widths[1:-1]}"
    if why is not None:
        raise ImplementationUnavailable(
            f"implementation 'triton' of neural_memory {why}; choose implementation 'plain'."
        )
    # Larger tiles are fewer steps one after the other; beside long chunks they do not fit the registers.
    tiles = (64, 32) if chunk_tokens <= MIN_TILE else (32,)
    tile = next((tile for tile in tiles if all(width % tile == 0 for width in widths)), MIN_TILE)
    # TF32 in three products is nearly float32 on tensor cores. In one it is not enough for bfloat16 either:
    # it cuts its inputs off, and weights that are carried along a sequence lose 1% by it.
    precision = "ieee" if dtype == torch.float32 else "tf32x3"
    return Plan(widths, chunk_tokens, tile, precision)


def pack(weights: Weights, plan: Plan) -> Tensor:
    """Matrices (B, H, in, out) -> (B H, P), each filled up with zeros."""
    widths = plan.padded
    parts = []
    for layer, w in enumerate(weights):
        padding = (0, widths[layer + 1] - w.shape[3], 0, widths[layer] - w.shape[2])
        parts.append(F.pad(w, padding).flatten(2).flatten(0, 1))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def unpack(packed: Tensor, like: Weights, plan: Plan) -> Weights:
    """The inverse of `pack`, in storage of their own."""
    widths, parts, first = plan.padded, [], 0
    for layer, w in enumerate(like):
        rows, columns = widths[layer], widths[layer + 1]
        part = packed[:, first : first + rows * columns].unflatten(1, (rows, columns))
        parts.append(part[:, : w.shape[2], : w.shape[3]].clone(memory_format=torch.contiguous_format))
        first += rows * columns
    return tuple(part.view(w.shape) for part, w in zip(parts, like, strict=True))


def _coefficients(
    gates: tuple[Tensor, ...], num_chunks: int, position: int, plan: Plan
) -> tuple[Tensor, Tensor]:
    """mixing and vectors of every chunk: see kernel_coefficients."""
    batch_size, num_tokens, num_heads = gates[0].shape
    num_programs, rows = batch_size * num_heads * num_chunks, plan.num_rows
    mixing = gates[0].new_empty(num_programs, rows, rows, dtype=torch.float32)
    vectors = gates[0].new_empty(num_programs, 5, rows, dtype=torch.float32)
    coefficients_kernel[(num_programs,)](
        *gates, mixing, vectors, num_tokens, num_heads, num_chunks, position,
        **plan.chunk_constants(),
    )  # fmt: skip
    return mixing, vectors


def _forward(
    tokens: tuple[Tensor, ...],
    carried: tuple[Tensor, ...],
    position: int,
    plan: Plan,
    checkpoint_chunks: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k, v and the gates, packed weights, momentum and, where it is read, start -> y, weights and momentum
    (B H, 2 or 3, P), and checkpoints every so many chunks, None where checkpoint_chunks is 0."""
    q, k, v, *gates = tokens
    batch_size, num_tokens, num_heads = gates[0].shape
    num_programs, num_chunks = batch_size * num_heads, num_chunks_of(num_tokens, position, plan)
    mixing, vectors = _coefficients(tuple(gates), num_chunks, position, plan)
    carried_now = torch.stack(carried, dim=1)
    arrays = carried_now.new_empty(num_programs, *plan.array(4))
    y = torch.empty_like(v, dtype=q.dtype)
    checkpoints = None
    if checkpoint_chunks:
        num_checkpoints = triton.cdiv(num_chunks, checkpoint_chunks)
        checkpoints = carried_now.new_empty(num_programs, num_checkpoints, 2, plan.num_weights)
    forward_kernel[(num_programs,)](
        q, k, v, mixing, vectors, carried_now, checkpoints if checkpoint_chunks else arrays, arrays, y,
        num_tokens, num_heads, num_chunks, position, max(1, checkpoint_chunks),
        HAS_START=len(carried) - 2, HAS_CHECKPOINTS=checkpoint_chunks > 0, **plan.walk_constants(),
    )  # fmt: skip
    return y, carried_now, checkpoints


def num_chunks_of(num_tokens: int, position: int, plan: Plan) -> int:
    return -(-(position + num_tokens) // plan.chunk_tokens)


def checkpoint_chunks_of(num_chunks: int) -> int:
    """How many chunks a checkpoint is for. The square root has the fewest checkpoints and states of a group
    together; but a model keeps the checkpoints of all its layers, and the states of one group at a time."""
    return min(num_chunks, math.ceil(2 * math.sqrt(num_chunks)))


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, position: int, plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, carried = tensors[:6], tensors[6:]
        checkpoint_chunks = checkpoint_chunks_of(num_chunks_of(tokens[3].shape[1], position, plan))
        y, carried_now, checkpoints = _forward(tokens, carried, position, plan, checkpoint_chunks)
        ctx.position, ctx.plan, ctx.checkpoint_chunks = position, plan, checkpoint_chunks
        ctx.save_for_backward(*tokens, checkpoints, *carried[2:])
        return y, carried_now[:, 0].contiguous(), carried_now[:, 1].contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_y: Tensor, g_weights: Tensor, g_momentum: Tensor) -> tuple[Tensor | None, ...]:
        *tokens, checkpoints = ctx.saved_tensors[:7]
        start = ctx.saved_tensors[7:]
        q, k, v, *gates = tokens
        position, plan, checkpoint_chunks = ctx.position, ctx.plan, ctx.checkpoint_chunks
        batch_size, num_tokens, num_heads = gates[0].shape
        num_programs, num_chunks = batch_size * num_heads, num_chunks_of(num_tokens, position, plan)
        mixing, vectors = _coefficients(tuple(gates), num_chunks, position, plan)
        num_states = checkpoint_chunks + len(start)
        states = checkpoints.new_empty(num_programs, num_states, 2, plan.num_weights)
        if start:
            states[:, -1, 0] = start[0]
        g_carried = torch.stack((g_weights, g_momentum) + (g_weights,) * len(start), dim=1)
        arrays = checkpoints.new_empty(num_programs, *plan.array(11))
        g_q, g_k, g_v = (torch.empty_like(t) for t in (q, k, v))
        g_mixing, g_vectors = torch.empty_like(mixing), torch.empty_like(vectors)
        backward_kernel[(num_programs,)](
            q, k, v, mixing, vectors, checkpoints, states, arrays, g_y.contiguous(), g_carried,
            g_q, g_k, g_v, g_mixing, g_vectors,
            num_tokens, num_heads, num_chunks, position, checkpoint_chunks,
            HAS_START=len(start), **plan.walk_constants(),
        )  # fmt: skip
        g_gates: list[Tensor | None] = [None] * 3
        if any(ctx.needs_input_grad[5:8]):
            g_gates = [torch.empty_like(g) for g in gates]
            coefficients_backward_kernel[(num_programs * num_chunks,)](
                *gates, g_mixing, g_vectors, *g_gates, num_tokens, num_heads, num_chunks, position,
                **plan.chunk_constants(),
            )  # fmt: skip
        return None, None, g_q, g_k, g_v, *g_gates, *g_carried.unbind(1)


def _decode(
    tokens: tuple[Tensor, ...], start: Weights, weights: Weights, updates: Weights, plan: Plan
) -> tuple[Tensor, Weights, Weights]:
    """One token -> y, weights and momentum."""
    q, _, v = tokens[:3]
    num_programs, depth = q.shape[0] * q.shape[2], len(weights)
    new_weights, new_updates = (tuple(map(torch.empty_like, weights)) for _ in range(2))
    y = torch.empty_like(v, dtype=q.dtype)
    arrays = weights[0].new_empty(num_programs, 4, depth, max(plan.padded))
    matrices = (
        part[min(layer, depth - 1)]
        for part in (start, weights, updates, new_weights, new_updates)
        for layer in range(4)
    )
    decode_kernel[(num_programs,)](
        *tokens, *matrices, arrays, y,
        KEY_WIDTH=plan.widths[0], HIDDEN_WIDTH=plan.widths[1], VALUE_WIDTH=plan.widths[-1], DEPTH=depth,
        WIDEST=max(plan.padded), TILE=plan.TILE, num_warps=8 if plan.TILE == 64 else 4, num_stages=1,
    )  # fmt: skip
    return y, new_weights, new_updates


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
    """See archs.ops.neural_memory.neural_memory. Tokens and gates in their own dtypes, the state in float32.
    Kept for the backward pass, beside the inputs: weights and momentum of as many chunks as half the square
    root of their number."""
    plan = plan_of(state, chunk_tokens, q.dtype)
    tokens = tuple(t.contiguous() for t in (q, k, v, decay, step_size, momentum))
    num_tokens = q.shape[1]
    is_training = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*tokens, *state.start, *state.weights, *state.momentum)
    )

    if num_tokens == 1 and not is_training:
        start, weights, updates = (
            tuple(w.contiguous() for w in part)
            for part in (state.start if position else state.weights, state.weights, state.momentum)
        )
        y, weights, updates = _decode(tokens, start, weights, updates, plan)
        return y, NeuralMemoryState(start, weights, updates)

    def walk(first: int, last: int, at: int, *carried: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        some = tuple(t if last - first == num_tokens else t[:, first:last].contiguous() for t in tokens)
        if is_training:
            return _Walk.apply(at, plan, *some, *carried)
        y, now, _ = _forward(some, carried, at, plan, 0)
        return y, now[:, 0], now[:, 1]

    # The open chunk's first weights are part of the state: a walk ends before it, where it begins here.
    rest = (position + num_tokens) % chunk_tokens
    if rest >= num_tokens:
        rest = 0
    carried = [pack(state.weights, plan), pack(state.momentum, plan)]
    first_start = [pack(state.start, plan)] if position else []
    y, *carried = walk(0, num_tokens - rest, position, *carried, *first_start)
    start = state.start if position else state.weights
    if rest:
        start = unpack(carried[0], state.weights, plan)
        last_y, *carried = walk(num_tokens - rest, num_tokens, 0, *carried)
        y = torch.cat((y, last_y), dim=1)
    weights, updates = (unpack(packed, state.weights, plan) for packed in carried)
    return y, NeuralMemoryState(start, weights, updates)
