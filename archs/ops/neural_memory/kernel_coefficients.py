"""The scalars of every chunk from its gates, and the gates' gradients from theirs: one program a chunk.

With D_il = prod_(l < m <= i) (1 - decay_m) and Q_lj the same of the momentum, both lower triangular with
ones on the diagonal, chunk.py's recurrences unroll to P_lj = -step_size_j Q_lj and C = D P: products only,
so gates of exactly 0 and 1 are exact. The gradient of a product with one factor left out is again a product
of two entries of such a matrix, one before the factor and one after it: no division there either.

`vectors` (5, ROWS) of a chunk: alpha, beta, C's last row, P's last row, and p with S_i = p_i S + ...
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from archs.ops.neural_memory.kernel_tiles import COUNTS, grid, span_of


@triton.jit
def products_between(factor, before, ROWS: tl.constexpr):
    """(i, j) -> the product of the factors after j up to i, 0 where i < j. `before` True: up to i - 1, for
    factors that are given one place later, 0 where i - 1 < j."""
    i, j = tl.arange(0, ROWS)[:, None] - before, tl.arange(0, ROWS)[None, :]
    products = tl.cumprod(tl.where(i > j, factor[:, None], 1.0), axis=0)
    return tl.where(i >= j, products, 0.0)


@triton.jit
def place_of(num_tokens, num_heads, num_chunks, position, CHUNK: tl.constexpr):
    """Of this program's chunk: where its first gate is, how many tokens, and the program's number."""
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // num_chunks, program % num_chunks
    first, count = span_of(chunk, position, num_tokens, CHUNK)
    at = ((row // num_heads) * num_tokens + first) * num_heads + row % num_heads
    return at, count, program


@triton.jit(do_not_specialize=COUNTS)
def coefficients_kernel(
    decay_ptr,
    step_size_ptr,
    momentum_ptr,
    mixing_ptr,
    vectors_ptr,
    num_tokens,
    num_heads,
    num_chunks,
    position,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gates (B, T, H) -> mixing = C (B H chunks, ROWS, ROWS) and vectors (B H chunks, 5, ROWS)."""
    at, count, program = place_of(num_tokens, num_heads, num_chunks, position, CHUNK)
    rows = tl.arange(0, ROWS)
    is_token = rows < count
    gates = at + rows * num_heads
    keep = 1 - tl.load(decay_ptr + gates, mask=is_token, other=0.0).to(tl.float32)
    step_size = tl.load(step_size_ptr + gates, mask=is_token, other=0.0).to(tl.float32)
    momentum = tl.load(momentum_ptr + gates, mask=is_token, other=0.0).to(tl.float32)
    kept = products_between(keep, 0, ROWS)
    momentum_mixing = -products_between(momentum, 0, ROWS) * step_size[None, :]
    mixing = tl.where(is_token[:, None], tl.dot(kept, momentum_mixing, input_precision=PRECISION), 0.0)
    p = tl.cumprod(momentum, axis=0)
    is_last = (rows == count - 1)[:, None]
    vectors = vectors_ptr + program * 5 * ROWS + rows
    tl.store(mixing_ptr + program * ROWS * ROWS + grid(ROWS, ROWS, ROWS), mixing)
    tl.store(vectors, tl.where(is_token, tl.cumprod(keep, axis=0), 0.0))
    tl.store(vectors + ROWS, tl.where(is_token, tl.sum(kept * p[None, :], axis=1), 0.0))
    tl.store(vectors + 2 * ROWS, tl.sum(tl.where(is_last, mixing, 0.0), axis=0))
    tl.store(vectors + 3 * ROWS, tl.sum(tl.where(is_last, momentum_mixing, 0.0), axis=0))
    tl.store(vectors + 4 * ROWS, tl.where(is_token, p, 0.0))


@triton.jit
def gate_gradient(g_between, g_running, between, shifted, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of the factors of products_between, `between`, and of their running product, from the
    gradients of both; `shifted` are the factors one place later."""
    after = tl.dot(tl.trans(between), g_between, input_precision=PRECISION)
    running = tl.cumprod(shifted, axis=0) * tl.sum(between * g_running[:, None], axis=0)
    return tl.sum(after * products_between(shifted, 1, ROWS), axis=1) + running


@triton.jit(do_not_specialize=COUNTS)
def coefficients_backward_kernel(
    decay_ptr,
    step_size_ptr,
    momentum_ptr,
    g_mixing_ptr,
    g_vectors_ptr,
    g_decay_ptr,
    g_step_size_ptr,
    g_momentum_ptr,
    num_tokens,
    num_heads,
    num_chunks,
    position,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gates and the gradients of mixing and vectors -> the gradients of the gates."""
    at, count, program = place_of(num_tokens, num_heads, num_chunks, position, CHUNK)
    rows = tl.arange(0, ROWS)
    is_token = rows < count
    gates = at + rows * num_heads
    keep = 1 - tl.load(decay_ptr + gates, mask=is_token, other=0.0).to(tl.float32)
    step_size = tl.load(step_size_ptr + gates, mask=is_token, other=0.0).to(tl.float32)
    momentum = tl.load(momentum_ptr + gates, mask=is_token, other=0.0).to(tl.float32)
    kept = products_between(keep, 0, ROWS)
    between = products_between(momentum, 0, ROWS)
    p = tl.cumprod(momentum, axis=0)
    is_last = (rows == count - 1)[:, None]
    g_vectors = g_vectors_ptr + program * 5 * ROWS + rows
    g_alpha, g_beta = tl.load(g_vectors), tl.load(g_vectors + ROWS)
    g_mixing = tl.load(g_mixing_ptr + program * ROWS * ROWS + grid(ROWS, ROWS, ROWS))
    g_mixing += tl.where(is_last, tl.load(g_vectors + 2 * ROWS)[None, :], 0.0)
    g_momentum_mixing = tl.dot(tl.trans(kept), g_mixing, input_precision=PRECISION)
    g_momentum_mixing += tl.where(is_last, tl.load(g_vectors + 3 * ROWS)[None, :], 0.0)
    g_p = tl.load(g_vectors + 4 * ROWS) + tl.sum(kept * g_beta[:, None], axis=0)
    momentum_mixing = -between * step_size[None, :]
    g_kept = (
        tl.dot(g_mixing, tl.trans(momentum_mixing), input_precision=PRECISION) + g_beta[:, None] * p[None, :]
    )
    g_between = -g_momentum_mixing * step_size[None, :]
    # The gate before each token; before the first there is none.
    is_later = is_token & (rows > 0)
    keep_before = 1 - tl.load(decay_ptr + gates - num_heads, mask=is_later, other=0.0).to(tl.float32)
    momentum_before = tl.load(momentum_ptr + gates - num_heads, mask=is_later, other=1.0).to(tl.float32)
    g_keep = gate_gradient(g_kept, g_alpha, kept, keep_before, ROWS, PRECISION)
    g_momentum = gate_gradient(g_between, g_p, between, momentum_before, ROWS, PRECISION)
    g_step_size = -tl.sum(g_momentum_mixing * between, axis=0)
    tl.store(g_decay_ptr + gates, (-g_keep).to(g_decay_ptr.dtype.element_ty), mask=is_token)
    tl.store(g_step_size_ptr + gates, g_step_size.to(g_step_size_ptr.dtype.element_ty), mask=is_token)
    tl.store(g_momentum_ptr + gates, g_momentum.to(g_momentum_ptr.dtype.element_ty), mask=is_token)
