"""The selective scan in Triton, forward and backward, in parallel over chunks of the sequence
(arXiv 2312.00752, section 3.3; the chunks as in any parallel scan).

Forward, three kernels: what each chunk alone adds to the state by its end; the scan over chunks, which
turns that into every chunk's first state; every chunk's outputs from its first state. Backward, the
same with time reversed for the gradients of the chunks' first states, then one kernel that recomputes a
chunk's states from its first and makes all its gradients. Kept for the backward pass: the inputs and one
state a chunk, E N / CHUNK_TOKENS numbers a token.

On chip: a program holds (CHUNK_TOKENS, channels) tiles of x, dt and their gradients in registers and
takes the state's N entries one after another; an associative scan over the tile's tokens gives that
entry of all its states. The serial chain is T / CHUNK_TOKENS multiply-adds in the scan over chunks; the
rest is N steps a program, whatever T is. Decays are multiplied or their exponents added, never
divided or subtracted, so a decay of any strength is exact. All arithmetic is float32.

Glossary in archs/ops/selective_scan; there, and here: g is the gradient of h.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops.operation import ImplementationUnavailable

CHUNK_TOKENS = 64  # a power of two
BLOCK_CHANNELS = 32  # of a tile, at most; a power of two
NUM_WARPS = 4  # 16 numbers a thread and tile of (64, 32): about eight tiles are alive in the backward pass
CARRY_CHANNELS = 64  # of a program of the scan over chunks: one warp
STEP_ELEMENTS = 1024  # of the state, a program of the single step


@triton.jit
def _compose(decay, added, next_decay, next_added):
    """h -> decay h + added, and then the next: the associative operator of a linear recurrence."""
    return decay * next_decay, next_decay * added + next_added


@triton.jit
def _chunk_sums_kernel(
    u_ptr, dt_ptr, A_ptr, map_ptr, states_ptr, elapsed_ptr, T, E, N,
    IS_BACKWARD: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward: the state at a chunk's end from a state of zeros, into slot chunk + 1 of states (B, chunks
    + 1, N, E); u is x and map is B. Backward: the gradient of its first state from its own outputs, into
    slot chunk; u is dy and map is C. Both: the chunk's sum of dt, (B, chunks, E)."""
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channels < E
    first = chunk.to(tl.int64) * L
    # Rows walk away from the edge that the state is wanted at; dt is summed between the two.
    if IS_BACKWARD:
        tokens = rows
        between = tokens
        is_between = between < T - first
    else:
        tokens = L - 1 - rows
        between = tokens + 1
        is_between = (rows > 0) & (between < T - first)
    is_token = tokens < T - first
    inside = is_token[:, None] & is_channel[None, :]
    base = (batch * T + first) * E
    tile = tokens[:, None] * E + channels[None, :]
    u = tl.load(u_ptr + base + tile, mask=inside, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + base + tile, mask=inside, other=0.0).to(tl.float32)
    elapsed = tl.load(
        dt_ptr + base + between[:, None] * E + channels[None, :],
        mask=is_between[:, None] & is_channel[None, :],
        other=0.0,
    ).to(tl.float32)
    elapsed = tl.cumsum(elapsed, axis=0)
    if not IS_BACKWARD:
        u = u * dt
    total = tl.sum(dt, axis=0)
    tl.store(elapsed_ptr + (batch * num_chunks + chunk) * E + channels, total, mask=is_channel)
    slot = chunk if IS_BACKWARD else chunk + 1
    state_ptr = states_ptr + (batch * (num_chunks + 1) + slot) * N * E
    maps_ptr = map_ptr + (batch * T + first) * N
    for n in range(N):
        A_n = tl.load(A_ptr + n * E + channels, mask=is_channel, other=0.0)
        map_n = tl.load(maps_ptr + tokens * N + n, mask=is_token, other=0.0).to(tl.float32)
        terms = tl.exp(elapsed * A_n[None, :]) * u * map_n[:, None]
        tl.store(state_ptr + n * E + channels, tl.sum(terms, axis=0), mask=is_channel)


@triton.jit
def _carry_kernel(
    states_ptr, elapsed_ptr, A_ptr, num_chunks, E, N, IS_BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The scan over chunks, in place: states (B, chunks + 1, N, E) hold the first state in slot 0 and
    every chunk's own share behind it; backward, the last gradient in the last slot and the shares before
    it. A thread reads and writes the same entries throughout."""
    n = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channels < E
    batch = tl.program_id(2).to(tl.int64)
    A_n = tl.load(A_ptr + n * E + channels, mask=is_channel, other=0.0)
    slots = batch * (num_chunks + 1)
    first = slots + num_chunks if IS_BACKWARD else slots
    state = tl.load(states_ptr + (first * N + n) * E + channels, mask=is_channel, other=0.0)
    for i in range(num_chunks):
        chunk = num_chunks - 1 - i if IS_BACKWARD else i
        from_ptr = elapsed_ptr + (batch * num_chunks + chunk) * E + channels
        elapsed = tl.load(from_ptr, mask=is_channel, other=0.0)
        slot = slots + chunk if IS_BACKWARD else slots + chunk + 1
        entry_ptr = states_ptr + (slot * N + n) * E + channels
        added = tl.load(entry_ptr, mask=is_channel, other=0.0)
        state = tl.exp(A_n * elapsed) * state + added
        tl.store(entry_ptr, state, mask=is_channel)


@triton.jit
def _output_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, states_ptr, y_ptr, T, E, N,
    L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of one chunk and block of channels, from the chunk's first state."""
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channels < E
    first = chunk.to(tl.int64) * L
    is_token = rows < T - first
    inside = is_token[:, None] & is_channel[None, :]
    offsets = (batch * T + first) * E + rows[:, None] * E + channels[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + channels, mask=is_channel, other=0.0)
    dtx = dt * x
    y = D[None, :] * x
    maps = (batch * T + first) * N + rows * N
    state_ptr = states_ptr + (batch * (num_chunks + 1) + chunk) * N * E
    for n in range(N):
        A_n = tl.load(A_ptr + n * E + channels, mask=is_channel, other=0.0)
        start = tl.load(state_ptr + n * E + channels, mask=is_channel, other=0.0)
        B_n = tl.load(B_ptr + maps + n, mask=is_token, other=0.0).to(tl.float32)
        C_n = tl.load(C_ptr + maps + n, mask=is_token, other=0.0).to(tl.float32)
        decay = tl.exp(dt * A_n[None, :])
        since_start, h = tl.associative_scan((decay, dtx * B_n[:, None]), 0, _compose)
        y += (h + since_start * start[None, :]) * C_n[:, None]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, states_ptr, gradients_ptr, dy_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, T, E, N,
    L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk and block of channels. Shares of what channels or chunks have in common
    go to places of their own: dA (B, chunks, N, E), dD (B, chunks, E), dB and dC (blocks, B, T, N)."""
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    channels = block * BLOCK + tl.arange(0, BLOCK)
    is_channel = channels < E
    first = chunk.to(tl.int64) * L
    is_token = rows < T - first
    has_previous = is_token & (rows > 0)
    has_next = (rows < L - 1) & (rows + 1 < T - first)
    inside = is_token[:, None] & is_channel[None, :]
    offsets = (batch * T + first) * E + rows[:, None] * E + channels[None, :]
    inside_previous = has_previous[:, None] & is_channel[None, :]
    dtx_previous = tl.load(x_ptr + offsets - E, mask=inside_previous, other=0.0).to(tl.float32)
    dtx_previous *= tl.load(dt_ptr + offsets - E, mask=inside_previous, other=0.0).to(tl.float32)
    inside_next = has_next[:, None] & is_channel[None, :]
    dt_next = tl.load(dt_ptr + offsets + E, mask=inside_next, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dtx = dt * x
    ddt = tl.zeros((L, BLOCK), dtype=tl.float32)
    ddtx = tl.zeros((L, BLOCK), dtype=tl.float32)
    maps = (batch * T + first) * N + rows * N
    share = (block.to(tl.int64) * tl.num_programs(2) + batch) * T * N + first * N + rows * N
    state = (batch * (num_chunks + 1) + chunk) * N * E
    dA_ptr += (batch * num_chunks + chunk) * N * E
    for n in range(N):
        A_n = tl.load(A_ptr + n * E + channels, mask=is_channel, other=0.0)
        start = tl.load(states_ptr + state + n * E + channels, mask=is_channel, other=0.0)
        later = tl.load(gradients_ptr + state + (N + n) * E + channels, mask=is_channel, other=0.0)
        B_n = tl.load(B_ptr + maps + n, mask=is_token, other=0.0).to(tl.float32)
        B_previous = tl.load(B_ptr + maps + n - N, mask=has_previous, other=0.0).to(tl.float32)
        C_n = tl.load(C_ptr + maps + n, mask=is_token, other=0.0).to(tl.float32)
        # carried_t = exp(dt_t A) h_{t-1}, itself a recurrence, so that h needs no moving by a row.
        decay = tl.exp(dt * A_n[None, :])
        terms = decay * dtx_previous * B_previous[:, None]
        since_start, carried = tl.associative_scan((decay, terms), 0, _compose)
        carried += since_start * start[None, :]
        # g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}
        decay = tl.exp(dt_next * A_n[None, :])
        until_end, g = tl.associative_scan((decay, dy * C_n[:, None]), 0, _compose, reverse=True)
        g += until_end * later[None, :]
        dC_n = tl.sum((carried + dtx * B_n[:, None]) * dy, axis=1)
        tl.store(dC_ptr + share + n, dC_n, mask=is_token)
        tl.store(dB_ptr + share + n, tl.sum(g * dtx, axis=1), mask=is_token)
        ddtx += g * B_n[:, None]
        dexponent = g * carried
        ddt += dexponent * A_n[None, :]
        tl.store(dA_ptr + n * E + channels, tl.sum(dexponent * dt, axis=0), mask=is_channel)
    D = tl.load(D_ptr + channels, mask=is_channel, other=0.0)
    tl.store(dx_ptr + offsets, (ddtx * dt + D[None, :] * dy).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(ddt_ptr + offsets, (ddt + ddtx * x).to(ddt_ptr.dtype.element_ty), mask=inside)
    dD_ptr += (batch * num_chunks + chunk) * E
    tl.store(dD_ptr + channels, tl.sum(dy * x, axis=0), mask=is_channel)


@triton.jit
def _step_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, state_ptr, y_ptr, E, N,
    x_stride, dt_stride, B_stride, C_stride, state_stride, state_channel_stride, state_entry_stride,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One token of one sequence and block of channels; the state's tile is read once and written once."""
    batch = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    entries = tl.arange(0, BLOCK_N)
    is_channel, is_entry = channels < E, entries < N
    inside = is_channel[:, None] & is_entry[None, :]
    x = tl.load(x_ptr + batch * x_stride + channels, mask=is_channel, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + batch * dt_stride + channels, mask=is_channel, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + batch * B_stride + entries, mask=is_entry, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + batch * C_stride + entries, mask=is_entry, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + channels[:, None] * N + entries[None, :], mask=inside, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    state_ptr += batch * state_stride
    state_ptr += channels[:, None] * state_channel_stride + entries[None, :] * state_entry_stride
    h = tl.load(state_ptr, mask=inside, other=0.0)
    h = tl.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
    tl.store(state_ptr, h, mask=inside)
    y = tl.sum(h * C[None, :], axis=1) + D * x
    tl.store(y_ptr + batch * E + channels, y.to(y_ptr.dtype.element_ty), mask=is_channel)


def _block_channels(num_channels: int) -> int:
    return min(BLOCK_CHANNELS, triton.next_power_of_2(num_channels))


def _chunk_edges(
    states: Tensor, u: Tensor, dt: Tensor, A: Tensor, maps: Tensor, *, is_backward: bool
) -> None:
    """Fills states (B, chunks + 1, N, E), given the first slot; backward, the last. A (N, E)."""
    batch_size, num_slots, state_width, num_channels = states.shape
    num_chunks, block = num_slots - 1, _block_channels(num_channels)
    elapsed = states.new_empty(batch_size, num_chunks, num_channels)
    grid = (num_chunks, triton.cdiv(num_channels, block), batch_size)
    sizes = (dt.shape[1], num_channels, state_width)
    _chunk_sums_kernel[grid](
        u, dt, A, maps, states, elapsed, *sizes, is_backward, CHUNK_TOKENS, block, num_warps=NUM_WARPS
    )
    grid = (state_width, triton.cdiv(num_channels, CARRY_CHANNELS), batch_size)
    _carry_kernel[grid](
        states, elapsed, A, num_chunks, num_channels, state_width, is_backward, CARRY_CHANNELS, num_warps=1
    )


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, the final state, and the chunks' first states (B, chunks + 1, N, E)."""
    batch_size, num_tokens, num_channels = x.shape
    num_chunks, block = triton.cdiv(num_tokens, CHUNK_TOKENS), _block_channels(num_channels)
    states = x.new_empty(batch_size, num_chunks + 1, A.shape[1], num_channels, dtype=torch.float32)
    states[:, 0] = 0.0 if initial_state is None else initial_state.transpose(1, 2)
    x, dt, B, C = (tensor.contiguous() for tensor in (x, dt, B, C))
    A, D = A.float().t().contiguous(), D.float().contiguous()
    _chunk_edges(states, x, dt, A, B, is_backward=False)
    y = torch.empty_like(x)
    grid = (num_chunks, triton.cdiv(num_channels, block), batch_size)
    sizes = (num_tokens, num_channels, A.shape[0])
    _output_kernel[grid](x, dt, A, B, C, D, states, y, *sizes, CHUNK_TOKENS, block, num_warps=NUM_WARPS)
    return y, states[:, -1].transpose(1, 2).contiguous(), states


class _SelectiveScan(torch.autograd.Function):
    """`_forward` with gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        y, final, states = _forward(*inputs)
        ctx.save_for_backward(*inputs[:6], states)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *given, states = ctx.saved_tensors
        with torch.cuda.device_of(dy):
            gradients = _backward(*given, states, dy, dfinal)
        needed = zip(gradients, [*given, states], ctx.needs_input_grad, strict=True)
        return tuple(gradient.to(tensor.dtype) if needs else None for gradient, tensor, needs in needed)


def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    states: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of x, dt, A, B, C, D and the initial state."""
    batch_size, num_tokens, num_channels = x.shape
    num_chunks, state_width = states.shape[1] - 1, states.shape[2]
    block = _block_channels(num_channels)
    num_blocks = triton.cdiv(num_channels, block)
    x, dt, B, C, dy = (tensor.contiguous() for tensor in (x, dt, B, C, dy))
    A, D = A.float().t().contiguous(), D.float().contiguous()
    gradients = torch.empty_like(states)
    gradients[:, -1] = dfinal.transpose(1, 2)
    _chunk_edges(gradients, dy, dt, A, C, is_backward=True)
    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    dA = states.new_empty(batch_size, num_chunks, state_width, num_channels)
    dD = states.new_empty(batch_size, num_chunks, num_channels)
    dB, dC = (states.new_empty(num_blocks, batch_size, num_tokens, state_width) for _ in range(2))
    sizes = (num_tokens, num_channels, state_width)
    _gradient_kernel[(num_chunks, num_blocks, batch_size)](
        x, dt, A, B, C, D, states, gradients, dy, dx, ddt, dA, dB, dC, dD, *sizes,
        CHUNK_TOKENS, block, num_warps=NUM_WARPS,
    )  # fmt: skip
    shared = dA.sum((0, 1)).t(), dB.sum(0), dC.sum(0), dD.sum((0, 1))
    return dx, ddt, *shared, gradients[:, 0].transpose(1, 2).contiguous()


def _check(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ImplementationUnavailable(
            "implementation 'triton' of selective_scan takes float32, bfloat16 or float16, not "
            "torch.float64; use 'plain'."
        )


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See archs.ops.selective_scan.selective_scan. Once differentiable.

    Raises ImplementationUnavailable for float64."""
    _check(x.dtype)
    inputs = (x, dt, A, B, C, D, initial_state)
    with torch.cuda.device_of(x):
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
            return _SelectiveScan.apply(*inputs)
        return _forward(*inputs)[:2]


def selective_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """See archs.ops.selective_scan.selective_step: one launch. Raises ImplementationUnavailable for a
    float64 state."""
    _check(state.dtype)
    batch_size, num_channels, state_width = state.shape
    x, dt, B, C = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, dt, B, C))
    y = x.new_empty(batch_size, num_channels)
    entries = triton.next_power_of_2(state_width)
    block = max(1, STEP_ELEMENTS // entries)
    strides = (x.stride(0), dt.stride(0), B.stride(0), C.stride(0), *state.stride())
    with torch.cuda.device_of(x):
        _step_kernel[(triton.cdiv(num_channels, block), batch_size)](
            x, dt, A.contiguous(), B, C, D.contiguous(), state, y, num_channels, state_width, *strides,
            block, entries, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y
