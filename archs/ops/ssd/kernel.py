"""State-space duality in Triton, forward and backward: matrix products inside blocks of tokens, in parallel
over chunks and heads (arXiv 2405.21060, section 6).

Forward, three kernels: what each chunk alone adds to the state by its end; the scan over chunks, which
turns that into every chunk's first state; the outputs of every block of a chunk, from the blocks up to it
and the chunk's first state. Backward, with chunks of one block: the first two again for every block's
first state, the same with time reversed for the gradients of those states, then one kernel that makes all
gradients of a block. Nothing but the inputs is kept for the backward pass. While it runs it needs 2 P N / L
numbers a token and head for the states and their gradients, and 2 N for the shares of dB and dC.

On chip: a program holds tiles of at most MAX_TILE tokens, channels of a head and state entries, and walks
over the state's entries, so that registers do not depend on P and N: forward (L, L) scores and y (L, P);
backward scores and their gradients, the decays between a block's tokens, x, dy and dx. The serial chain
is the scan over chunks, T / chunk_tokens multiply-adds, and backward T / L of them.

Exponents are sums of dt, none a difference of two longer sums, so a decay of any strength is exact.
The state and all sums are float32; operands of products are bfloat16 where x, B and C all are.

Glossary in archs/ops/ssd; here also L tokens of a block, M blocks of a chunk, g the gradient of h.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops.operation import ImplementationUnavailable

# The largest side of a tile, of tokens, channels or state entries, by the products' operands. Products of
# float32 keep whole rows of their operands in registers, those of bfloat16 go through the tensor cores.
MAX_TILE = {tl.bfloat16: 64, tl.float32: 32}
NUM_WARPS = 8  # 16 numbers a thread of a (64, 64) tile: no spills, or a few
NUM_STAGES = 1  # no loads ahead: the loops are short
BACKWARD_CHUNK_TOKENS = 64
CARRY_ELEMENTS = 1024  # of the state, a program of the scan over chunks: 8 a thread
STEP_ELEMENTS = 2048  # of the state, a program of the single step


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr):
    """a @ b with operands in OPERAND, summed in float32."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision="ieee")


@triton.jit
def _load_rows(ptr, rows, columns, stride, is_row, is_column):
    """A tile of rows `stride` apart; zeros outside."""
    mask = is_row[:, None] & is_column[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _sums_of_steps(dt, rows):
    """dt (L,) -> its sums up to and with each token, and over the tokens after each, both (L,)."""
    is_earlier = rows[:, None] > rows[None, :]
    is_later = rows[:, None] < rows[None, :]
    upto = tl.sum(tl.where(is_later, 0.0, dt[None, :]), axis=1)
    after = tl.sum(tl.where(is_earlier | (rows[:, None] == rows[None, :]), 0.0, dt[None, :]), axis=1)
    return upto, after


@triton.jit
def _decay_matrix(dt, A, rows):
    """(i, j) -> the decay from token j to token i, 0 where j is after i (the paper's L, listing 1)."""
    between = tl.cumsum(tl.where(rows[:, None] > rows[None, :], dt[:, None], 0.0), axis=0)
    return tl.where(rows[:, None] >= rows[None, :], tl.exp(A * between), 0.0)


@triton.jit
def _scores(C_ptr, B_ptr, rows, C_token, B_token, is_row, is_column, N, OPERAND: tl.constexpr,
            L: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """C_i B_j for the L tokens that each pointer is at, (i, j)."""
    scores = tl.zeros((L, L), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        entries = start + tl.arange(0, BLOCK_N)
        C = _load_rows(C_ptr, rows, entries, C_token, is_row, entries < N)
        B = _load_rows(B_ptr, rows, entries, B_token, is_column, entries < N)
        scores += _dot(C, tl.trans(B), OPERAND)
    return scores


@triton.jit
def _chunk_states_kernel(
    u_ptr, dt_ptr, A_ptr, map_ptr, states_ptr, elapsed_ptr, T, H, P, N, heads_per_group,
    u_batch, u_token, u_head, dt_batch, dt_token, dt_head, map_batch, map_token, map_group,
    IS_BACKWARD: tl.constexpr, OPERAND: tl.constexpr,
    L: tl.constexpr, M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Forward: the state at a chunk's end from a state of zeros, into slot chunk + 1 of states (B, chunks
    + 1, H, P, N); u is x and map is B. Backward, where a chunk is one block: the gradient of its first
    state from its own outputs, into slot chunk; u is dy and map is C. Both: the chunk's sum of dt, (B,
    chunks, H). A program makes a (BLOCK_P, BLOCK_N) tile."""
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    columns = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(P, BLOCK_P) * columns
    head, tile = (tl.program_id(1) // tiles).to(tl.int64), tl.program_id(1) % tiles
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    channels = tile // columns * BLOCK_P + tl.arange(0, BLOCK_P)
    entries = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    is_channel, is_entry = channels < P, entries < N
    A = tl.load(A_ptr + head)
    u_ptr += batch * u_batch + head * u_head
    dt_ptr += batch * dt_batch + head * dt_head
    map_ptr += batch * map_batch + (head // heads_per_group) * map_group
    state = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    elapsed = 0.0
    for m in range(M):
        first = (chunk.to(tl.int64) * M + m) * L
        is_token = rows < T - first
        dt = tl.load(dt_ptr + first * dt_token + rows * dt_token, mask=is_token, other=0.0).to(tl.float32)
        u = _load_rows(u_ptr + first * u_token, rows, channels, u_token, is_token, is_channel)
        maps = _load_rows(map_ptr + first * map_token, rows, entries, map_token, is_token, is_entry)
        upto, after = _sums_of_steps(dt, rows)
        weight = tl.exp(A * upto) if IS_BACKWARD else dt * tl.exp(A * after)
        total = tl.sum(dt, axis=0)
        added = _dot(tl.trans(u.to(tl.float32) * weight[:, None]), maps, OPERAND)
        state = state * tl.exp(A * total) + added
        elapsed += total
    slot = chunk if IS_BACKWARD else chunk + 1
    offset = ((batch * (num_chunks + 1) + slot) * H + head) * P * N
    mask = is_channel[:, None] & is_entry[None, :]
    tl.store(states_ptr + offset + channels[:, None] * N + entries[None, :], state, mask=mask)
    if tile == 0:
        tl.store(elapsed_ptr + (batch * num_chunks + chunk) * H + head, elapsed)


@triton.jit
def _carry_kernel(
    states_ptr, elapsed_ptr, A_ptr, num_chunks, H, PN, IS_BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The scan over chunks, in place: states (B, chunks + 1, H, P N) hold the first state in slot 0 and
    every chunk's own share behind it; backward, the last gradient in the last slot and the shares before
    it. A thread reads and writes the same entries throughout."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_entry = entries < PN
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    A = tl.load(A_ptr + head)
    slots = batch * (num_chunks + 1)
    first = slots + num_chunks if IS_BACKWARD else slots
    state = tl.load(states_ptr + (first * H + head) * PN + entries, mask=is_entry, other=0.0)
    for i in range(num_chunks):
        chunk = num_chunks - 1 - i if IS_BACKWARD else i
        elapsed = tl.load(elapsed_ptr + (batch * num_chunks + chunk) * H + head)
        slot = slots + chunk if IS_BACKWARD else slots + chunk + 1
        entry_ptr = states_ptr + (slot * H + head) * PN + entries
        added = tl.load(entry_ptr, mask=is_entry, other=0.0)
        state = tl.exp(A * elapsed) * state + added
        tl.store(entry_ptr, state, mask=is_entry)


@triton.jit
def _output_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, states_ptr, y_ptr, T, H, P, N, heads_per_group,
    x_batch, x_token, x_head, dt_batch, dt_token, dt_head,
    B_batch, B_token, B_group, C_batch, C_token, C_group,
    OPERAND: tl.constexpr, L: tl.constexpr, M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y of one block and head, from the blocks of its chunk up to it and the chunk's first state."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    chunk, m = block // M, block % M
    parts = tl.cdiv(P, BLOCK_P)
    head, part = (tl.program_id(1) // parts).to(tl.int64), tl.program_id(1) % parts
    group = head // heads_per_group
    batch = tl.program_id(2).to(tl.int64)
    rows, columns = tl.arange(0, L), tl.arange(0, BLOCK_P)
    channels = part * BLOCK_P + columns
    is_channel = channels < P
    first = block.to(tl.int64) * L
    is_token = rows < T - first
    A, D = tl.load(A_ptr + head), tl.load(D_ptr + head)
    # The pointers stand at the block; the blocks before it, which are whole, lie at negative offsets.
    x_ptr += batch * x_batch + head * x_head + first * x_token
    dt_ptr += batch * dt_batch + head * dt_head + first * dt_token
    B_ptr += batch * B_batch + group * B_group + first * B_token
    C_ptr += batch * C_batch + group * C_group + first * C_token
    dt = tl.load(dt_ptr + rows * dt_token, mask=is_token, other=0.0).to(tl.float32)
    upto, _ = _sums_of_steps(dt, rows)

    # The chunk's blocks before this one, latest first; since is the sum of dt from there to here.
    y = tl.zeros((L, BLOCK_P), dtype=tl.float32)
    since = 0.0
    for i in range(m):
        back = (i + 1) * L
        dt_j = tl.load(dt_ptr - back * dt_token + rows * dt_token).to(tl.float32)
        x_j = _load_rows(x_ptr - back * x_token, rows, channels, x_token, rows < L, is_channel)
        B_j_ptr = B_ptr - back * B_token
        scores = _scores(C_ptr, B_j_ptr, rows, C_token, B_token, is_token, rows < L, N, OPERAND, L, BLOCK_N)
        _, after = _sums_of_steps(dt_j, rows)
        weight = dt_j * tl.exp(A * (after + since))
        y += _dot(scores * weight[None, :], x_j, OPERAND)
        since += tl.sum(dt_j, axis=0)

    # The chunk's first state.
    num_chunks = tl.cdiv(num_blocks, M)
    state_ptr = states_ptr + ((batch * (num_chunks + 1) + chunk) * H + head) * P * N + part * BLOCK_P * N
    carried = tl.zeros((L, BLOCK_P), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        entries = start + tl.arange(0, BLOCK_N)
        C = _load_rows(C_ptr, rows, entries, C_token, is_token, entries < N)
        state = _load_rows(state_ptr, columns, entries, N, is_channel, entries < N)
        carried += _dot(C, tl.trans(state), OPERAND)
    y = (y + carried * tl.exp(A * since)) * tl.exp(A * upto)[:, None]

    # The block itself.
    x = _load_rows(x_ptr, rows, channels, x_token, is_token, is_channel)
    scores = _scores(C_ptr, B_ptr, rows, C_token, B_token, is_token, is_token, N, OPERAND, L, BLOCK_N)
    y += _dot(scores * _decay_matrix(dt, A, rows) * dt[None, :], x, OPERAND)
    y += D * x.to(tl.float32)
    out_ptr = y_ptr + ((batch * T + first) * H + head) * P + rows[:, None] * (H * P) + channels[None, :]
    tl.store(out_ptr, y.to(y_ptr.dtype.element_ty), mask=is_token[:, None] & is_channel[None, :])


@triton.jit
def _gradient_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, states_ptr, gradients_ptr, dy_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, T, H, P, N, heads_per_group,
    x_batch, x_token, x_head, dt_batch, dt_token, dt_head,
    B_batch, B_token, B_group, C_batch, C_token, C_group, dy_batch, dy_token, dy_head,
    OPERAND: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients of one block and head. Shares of what heads, parts of a head or blocks have in common
    go to places of their own, p the part of the head: dA, dD (p, B, blocks, H), ddt (p, B, T, H), dB, dC
    (p, B, T, H, N)."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    parts = tl.cdiv(P, BLOCK_P)
    head, part = (tl.program_id(1) // parts).to(tl.int64), tl.program_id(1) % parts
    group = head // heads_per_group
    batch = tl.program_id(2).to(tl.int64)
    rows, columns = tl.arange(0, L), tl.arange(0, BLOCK_P)
    channels = part * BLOCK_P + columns
    is_channel = channels < P
    first = block.to(tl.int64) * L
    is_token = rows < T - first
    is_after = rows[:, None] > rows[None, :]
    A, D = tl.load(A_ptr + head), tl.load(D_ptr + head)
    x_ptr += batch * x_batch + head * x_head + first * x_token
    dy_ptr += batch * dy_batch + head * dy_head + first * dy_token
    dt_ptr += batch * dt_batch + head * dt_head + first * dt_token
    B_ptr += batch * B_batch + group * B_group + first * B_token
    C_ptr += batch * C_batch + group * C_group + first * C_token
    share = ((part * tl.num_programs(2) + batch) * num_blocks + block) * H + head
    token = ((part * tl.num_programs(2) + batch) * T + first) * H + head + rows * H  # of ddt, dB and dC
    dt = tl.load(dt_ptr + rows * dt_token, mask=is_token, other=0.0).to(tl.float32)
    x = _load_rows(x_ptr, rows, channels, x_token, is_token, is_channel)
    dy = _load_rows(dy_ptr, rows, channels, dy_token, is_token, is_channel)

    # Inside the block: y_i = sum_j weights_ij dt_j x_j, of weights_ij = (C_i B_j) decay_ij.
    decay = _decay_matrix(dt, A, rows)
    scores = _scores(C_ptr, B_ptr, rows, C_token, B_token, is_token, is_token, N, OPERAND, L, BLOCK_N)
    weights = scores * decay
    dscores = _dot(dy, tl.trans(x), OPERAND)
    products = dscores * weights
    ddt = tl.sum(products, axis=0)
    # The decay of step s stands between every pair i >= s > j.
    products = tl.where(is_after, products * dt[None, :], 0.0)
    before = tl.cumsum(products, axis=1) - products
    dexponent = tl.sum(tl.where(rows[:, None] >= rows[None, :], before, 0.0), axis=0)
    dx = _dot(tl.trans(weights * dt[None, :]), dy, OPERAND)
    dscores *= decay * dt[None, :]

    # From the block's first state h and into its last, whose gradient is g.
    upto, after = _sums_of_steps(dt, rows)
    decay_upto, decay_after = tl.exp(A * upto), tl.exp(A * after)
    slot = ((batch * (num_blocks + 1) + block) * H + head) * P * N + part * BLOCK_P * N
    h_ptr = states_ptr + slot
    g_ptr = gradients_ptr + slot + H * P * N
    products_i, products_j = tl.zeros((L,), dtype=tl.float32), tl.zeros((L,), dtype=tl.float32)
    through = tl.zeros((BLOCK_P,), dtype=tl.float32)
    carried = tl.zeros((L, BLOCK_P), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        entries = start + tl.arange(0, BLOCK_N)
        is_entry = entries < N
        B = _load_rows(B_ptr, rows, entries, B_token, is_token, is_entry)
        C = _load_rows(C_ptr, rows, entries, C_token, is_token, is_entry)
        h = _load_rows(h_ptr, columns, entries, N, is_channel, is_entry)
        g = _load_rows(g_ptr, columns, entries, N, is_channel, is_entry)
        maps = token[:, None] * N + entries[None, :]
        mask = is_token[:, None] & is_entry[None, :]
        dyh = _dot(dy, h, OPERAND) * decay_upto[:, None]
        products_i += tl.sum(dyh * C.to(tl.float32), axis=1)
        tl.store(dC_ptr + maps, dyh + _dot(dscores, B, OPERAND), mask=mask)
        xg = _dot(x, g, OPERAND) * decay_after[:, None]
        products_j += tl.sum(xg * B.to(tl.float32), axis=1)
        tl.store(dB_ptr + maps, xg * dt[:, None] + _dot(tl.trans(dscores), C, OPERAND), mask=mask)
        carried += _dot(B, tl.trans(g), OPERAND)
        through += tl.sum(h * g, axis=1)
    dx += carried * (dt * decay_after)[:, None]
    # Step s decays the first state on its way to i >= s, what j < s add to the last, and one to the other.
    sum_i = tl.sum(tl.where(is_after, 0.0, products_i[None, :]), axis=1)
    sum_j = tl.sum(tl.where(is_after, (products_j * dt)[None, :], 0.0), axis=1)
    dexponent += sum_i + sum_j + tl.sum(through, axis=0) * tl.exp(A * tl.sum(dt, axis=0))

    tl.store(ddt_ptr + token, ddt + products_j + A * dexponent, mask=is_token)
    tl.store(dA_ptr + share, tl.sum(dexponent * dt, axis=0))
    x, dy = x.to(tl.float32), dy.to(tl.float32)
    tl.store(dD_ptr + share, tl.sum(tl.sum(x * dy, axis=1), axis=0))
    dx += D * dy
    dx_ptr += ((batch * T + first) * H + head) * P + rows[:, None] * (H * P) + channels[None, :]
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask=is_token[:, None] & is_channel[None, :])


@triton.jit
def _step_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, state_ptr, y_ptr, H, P, N, heads_per_group,
    x_batch, x_head, dt_batch, dt_head, B_batch, B_group, C_batch, C_group,
    state_batch, state_head, state_channel, state_entry,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One token of one head and block of channels; the state's tile is read once and written once."""
    head = tl.program_id(1)
    group = head // heads_per_group
    batch = tl.program_id(2).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    entries = tl.arange(0, BLOCK_N)
    is_channel, is_entry = channels < P, entries < N
    inside = is_channel[:, None] & is_entry[None, :]
    dt = tl.load(dt_ptr + batch * dt_batch + head * dt_head).to(tl.float32)
    A, D = tl.load(A_ptr + head).to(tl.float32), tl.load(D_ptr + head).to(tl.float32)
    x_ptr += batch * x_batch + head * x_head
    B_ptr += batch * B_batch + group * B_group
    C_ptr += batch * C_batch + group * C_group
    x = tl.load(x_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + entries, mask=is_entry, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + entries, mask=is_entry, other=0.0).to(tl.float32)
    state_ptr += batch * state_batch + head * state_head
    state_ptr += channels[:, None] * state_channel + entries[None, :] * state_entry
    h = tl.load(state_ptr, mask=inside, other=0.0)
    h = tl.exp(dt * A) * h + (dt * x)[:, None] * B[None, :]
    tl.store(state_ptr, h, mask=inside)
    y = tl.sum(h * C[None, :], axis=1) + D * x
    tl.store(y_ptr + (batch * H + head) * P + channels, y.to(y_ptr.dtype.element_ty), mask=is_channel)


def _operand(*tensors: Tensor) -> Any:
    """The dtype of the products' operands. The interpreter has no bfloat16 products."""
    is_bfloat16 = all(tensor.dtype == torch.bfloat16 for tensor in tensors) and tensors[0].is_cuda
    return tl.bfloat16 if is_bfloat16 else tl.float32


class _Tiles(NamedTuple):
    """How the work is cut: L, M, the parts of P and of N, and what a program is launched with."""

    tokens: int
    blocks: int
    channels: int
    entries: int
    operand: Any
    launch: dict[str, int]

    @classmethod
    def of(cls, x: Tensor, B: Tensor, C: Tensor, chunk_tokens: int) -> _Tiles:
        operand = _operand(x, B, C)
        largest = MAX_TILE[operand]
        tokens, channels, entries = (
            min(largest, max(16, triton.next_power_of_2(size)))
            for size in (chunk_tokens // 2 + 1, x.shape[3], B.shape[3])
        )
        launch = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
        return cls(tokens, max(1, chunk_tokens // tokens), channels, entries, operand, launch)


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _chunk_edges(
    states: Tensor, u: Tensor, dt: Tensor, A: Tensor, maps: Tensor, tiles: _Tiles, *, is_backward: bool
) -> None:
    """Fills states (B, chunks + 1, H, P, N), given the first slot; backward, the last."""
    batch_size, num_slots, num_heads, head_width, state_width = states.shape
    num_chunks = num_slots - 1
    elapsed = states.new_empty(batch_size, num_chunks, num_heads)
    num_tiles = triton.cdiv(head_width, tiles.channels) * triton.cdiv(state_width, tiles.entries)
    sizes = (dt.shape[1], num_heads, head_width, state_width, num_heads // maps.shape[2])
    strides = (*u.stride()[:3], *dt.stride(), *maps.stride()[:3])
    _chunk_states_kernel[(num_chunks, num_heads * num_tiles, batch_size)](
        u, dt, A, maps, states, elapsed, *sizes, *strides, is_backward, tiles.operand,
        tiles.tokens, tiles.blocks, tiles.channels, tiles.entries, **tiles.launch,
    )  # fmt: skip
    elements = head_width * state_width
    grid = (triton.cdiv(elements, CARRY_ELEMENTS), num_heads, batch_size)
    _carry_kernel[grid](states, elapsed, A, num_chunks, num_heads, elements, is_backward, CARRY_ELEMENTS)


def _first_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, initial_state: Tensor | None, tiles: _Tiles
) -> Tensor:
    """The chunks' first states and the final one, (B, chunks + 1, H, P, N)."""
    num_chunks = triton.cdiv(x.shape[1], tiles.tokens * tiles.blocks)
    shape = (x.shape[0], num_chunks + 1, *x.shape[2:], B.shape[3])
    states = x.new_empty(shape, dtype=torch.float32)
    states[:, 0] = 0.0 if initial_state is None else initial_state
    _chunk_edges(states, x, dt, A, B, tiles, is_backward=False)
    return states


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch_size, num_tokens, num_heads, head_width = x.shape
    num_groups, state_width = B.shape[2:]
    tiles = _Tiles.of(x, B, C, chunk_tokens)
    x, B, C = (_dense_rows(tensor) for tensor in (x, B, C))
    A, D = A.float().contiguous(), D.float().contiguous()
    states = _first_states(x, dt, A, B, initial_state, tiles)
    y = x.new_empty(x.shape)
    num_blocks = triton.cdiv(num_tokens, tiles.tokens)
    sizes = (num_tokens, num_heads, head_width, state_width, num_heads // num_groups)
    strides = (*x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3])
    _output_kernel[(num_blocks, num_heads * triton.cdiv(head_width, tiles.channels), batch_size)](
        x, dt, A, B, C, D, states, y, *sizes, *strides, tiles.operand,
        tiles.tokens, tiles.blocks, tiles.channels, tiles.entries, **tiles.launch,
    )  # fmt: skip
    return y, states[:, -1].clone()


class _StateSpaceDuality(torch.autograd.Function):
    """`_forward` with gradients."""

    @staticmethod
    def forward(ctx: Any, chunk_tokens: int, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return _forward(*inputs, chunk_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        with torch.cuda.device_of(dy):
            gradients = _backward(*ctx.saved_tensors, dy, dfinal)
        needed = zip(gradients, ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(gradient.to(tensor.dtype) if needs else None for gradient, tensor, needs in needed)


def _backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None,
    dy: Tensor, dfinal: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, dt, A, B, C, D and the initial state."""
    batch_size, _, num_heads, head_width = x.shape
    num_groups, state_width = B.shape[2:]
    tiles = _Tiles.of(x, B, C, chunk_tokens=BACKWARD_CHUNK_TOKENS)._replace(blocks=1)
    x, B, C, dy = (_dense_rows(tensor) for tensor in (x, B, C, dy))
    A, D = A.float().contiguous(), D.float().contiguous()
    states = _first_states(x, dt, A, B, initial_state, tiles)
    gradients = torch.empty_like(states)
    gradients[:, -1] = dfinal
    _chunk_edges(gradients, dy, dt, A, C, tiles, is_backward=True)
    num_blocks, num_parts = states.shape[1] - 1, triton.cdiv(head_width, tiles.channels)
    dx = x.new_empty(x.shape)
    ddt = states.new_empty(num_parts, *dt.shape)
    dB, dC = (states.new_empty(num_parts, *dt.shape, state_width) for _ in range(2))
    dA, dD = (states.new_empty(num_parts, batch_size, num_blocks, num_heads) for _ in range(2))
    sizes = (x.shape[1], num_heads, head_width, state_width, num_heads // num_groups)
    strides = (*x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3])
    _gradient_kernel[(num_blocks, num_heads * num_parts, batch_size)](
        x, dt, A, B, C, D, states, gradients, dy, dx, ddt, dA, dB, dC, dD, *sizes, *strides,
        tiles.operand, tiles.tokens, tiles.channels, tiles.entries, **tiles.launch,
    )  # fmt: skip
    dB, dC = (share.unflatten(3, (num_groups, -1)).sum((0, 4)) for share in (dB, dC))
    return dx, ddt.sum(0), dA.sum((0, 1, 2)), dB, dC, dD.sum((0, 1, 2)), gradients[:, 0].clone()


def _check(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ImplementationUnavailable(
            "implementation 'triton' of ssd takes float32, bfloat16 or float16, not torch.float64; "
            "use 'plain'."
        )


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
    """See archs.ops.ssd.ssd. Once differentiable. A chunk is made of blocks of 16, 32 or 64 tokens, so
    `chunk_tokens` counts rounded down to whole ones, and as one at least.

    Raises ImplementationUnavailable for float64."""
    _check(x.dtype)
    inputs = (x, dt, A, B, C, D, initial_state)
    with torch.cuda.device_of(x):
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
            return _StateSpaceDuality.apply(chunk_tokens, *inputs)
        return _forward(*inputs, chunk_tokens)


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """See archs.ops.ssd.ssd_step: one launch. Raises ImplementationUnavailable for a float64 state."""
    _check(state.dtype)
    batch_size, num_heads, head_width, state_width = state.shape
    x, B, C = (_dense_rows(tensor) for tensor in (x, B, C))
    y = x.new_empty(batch_size, num_heads, head_width)
    state_block = triton.next_power_of_2(state_width)
    block = min(triton.next_power_of_2(head_width), max(1, STEP_ELEMENTS // state_block))
    sizes = (num_heads, head_width, state_width, num_heads // B.shape[1])
    strides = (*x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2], *state.stride())
    with torch.cuda.device_of(x):
        _step_kernel[(triton.cdiv(head_width, block), num_heads, batch_size)](
            x, dt, A.contiguous(), B, C, D.contiguous(), state, y, *sizes, *strides, block, state_block
        )
    return y
