"""What the kernels of the neural memory share: tiles, products and the passes through the layers of a chunk.

Every matrix a program works on lies in global memory that only this program touches, and is walked in square
tiles; what one pass writes the next one reads after a barrier. Rows are the chunk's tokens, filled up with
zero rows to ROWS; widths are filled up with zeros to a multiple of TILE. Zeros stay zeros: SiLU(0) = 0.

Glossary, beside chunk.py's (a, d, M, S): z is a layer's output at the keys, u the gradient with respect to a
layer's input at the keys before SiLU's slope, x a layer's input at the queries and z_x its output there. Each
is an array (DEPTH, ROWS, WIDEST); matrices are packed, layer after layer, as (in, out). `cells` is the grid
of a block (ROWS, TILE) of an array, `tile` that of a tile of the layer's matrix.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

#: Arguments of the kernels whose values are not worth a compilation each.
COUNTS = ("num_tokens", "num_chunks", "position", "checkpoint_chunks")


@triton.jit
def grid(stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the elements of a block (ROWS, COLUMNS) lie in a matrix whose rows are `stride` apart."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def layer_shape(
    layer, DEPTH: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr
):
    """A layer's input and output widths, and where its matrix begins."""
    inner = tl.where(layer == 0, K, F)
    outer = tl.where(layer == DEPTH - 1, V, F)
    offset = tl.where(layer == 0, 0, K * F + (layer - 1) * F * F)
    return tl.multiple_of(inner, TILE), tl.multiple_of(outer, TILE), tl.multiple_of(offset, TILE)


@triton.jit
def span_of(chunk, position, num_tokens, CHUNK: tl.constexpr):
    """The first token of a chunk in this call, and how many the call has of it."""
    first = tl.maximum(chunk * CHUNK - position, 0)
    return first, tl.minimum((chunk + 1) * CHUNK - position, num_tokens) - first


@triton.jit
def silu(z):
    return z / (1 + tl.exp(-z))


@triton.jit
def silu_slope(z):
    gate = 1 / (1 + tl.exp(-z))
    return gate + z * gate * (1 - gate)


@triton.jit
def silu_curvature(z):
    gate = 1 / (1 + tl.exp(-z))
    return (1 - gate) * (2 * gate + z * gate * (1 - 2 * gate))


@triton.jit
def token_block(base, stride, column, count, width, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Pointers and mask of (ROWS, TILE) of a chunk's tokens, `count` of them, in q, k, v or their like."""
    rows, columns = tl.arange(0, ROWS), column + tl.arange(0, TILE)
    mask = (rows < count)[:, None] & (columns < width)[None, :]
    return base + rows[:, None] * stride + columns[None, :], mask


@triton.jit
def copy_tokens(
    base,
    stride,
    count,
    target,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """The tokens of a chunk, (count, WIDTH), into an array."""
    cells = grid(WIDEST, ROWS, TILE)
    for column in range(0, WIDTH, TILE):
        pointers, mask = token_block(base, stride, column, count, WIDTH, ROWS, TILE)
        tokens = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        tl.store(target + column + cells, tokens)


@triton.jit
def times(
    x, w, column, inner, outer, cells, tile, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
):
    """Columns of x @ W."""
    out = tl.full((ROWS, TILE), 0.0, tl.float32)
    for i in range(0, inner, TILE):
        left = tl.load(x + i + cells)
        right = tl.load(w + i * outer + column + tile)
        out = tl.dot(left, right, out, input_precision=PRECISION)
    return out


@triton.jit
def times_transposed(
    x, w, column, outer, cells, tile, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
):
    """Columns of x @ W'."""
    out = tl.full((ROWS, TILE), 0.0, tl.float32)
    for j in range(0, outer, TILE):
        left = tl.load(x + j + cells)
        right = tl.load(w + column * outer + j + tile)
        out = tl.dot(left, tl.trans(right), out, input_precision=PRECISION)
    return out


@triton.jit
def row_products(x, y, width, cells, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """x y', (ROWS, ROWS)."""
    out = tl.full((ROWS, ROWS), 0.0, tl.float32)
    for i in range(0, width, TILE):
        left = tl.load(x + i + cells)
        right = tl.load(y + i + cells)
        out = tl.dot(left, tl.trans(right), out, input_precision=PRECISION)
    return out


@triton.jit
def keys(
    v_base,
    v_stride,
    count,
    w,
    a,
    z,
    u,
    d,
    KEEP_U: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys up through the weights w, deltas down again: from a[0] to all of a, z, d and, if asked, u."""
    ARRAY: tl.constexpr = ROWS * WIDEST
    cells = grid(WIDEST, ROWS, TILE)
    for layer in range(DEPTH):
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        tile = grid(outer, TILE, TILE)
        for j in range(0, outer, TILE):
            out = times(a + layer * ARRAY, w + offset, j, inner, outer, cells, tile, ROWS, TILE, PRECISION)
            if layer == DEPTH - 1:
                pointers, mask = token_block(v_base, v_stride, j, count, VALUE_WIDTH, ROWS, TILE)
                v = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                tl.store(d + layer * ARRAY + j + cells, 2 * (out - v))
            else:
                tl.store(z + layer * ARRAY + j + cells, out)
                tl.store(a + (layer + 1) * ARRAY + j + cells, silu(out))
        tl.debug_barrier()
    for step in range(1, DEPTH):
        layer = DEPTH - step
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        tile = grid(outer, TILE, TILE)
        below = (layer - 1) * ARRAY
        for i in range(0, inner, TILE):
            out = times_transposed(
                d + layer * ARRAY, w + offset, i, outer, cells, tile, ROWS, TILE, PRECISION
            )
            slope = silu_slope(tl.load(z + below + i + cells))
            if KEEP_U:
                tl.store(u + below + i + cells, out)
            tl.store(d + below + i + cells, out * slope)
        tl.debug_barrier()


@triton.jit
def layers(
    y_base,
    y_stride,
    count,
    mixing,
    vectors,
    m,
    s,
    new_m,
    new_s,
    a,
    d,
    x,
    z_x,
    QUERIES: tl.constexpr,
    KEEP_Z_X: tl.constexpr,
    WRITE_Y: tl.constexpr,
    UPDATE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The queries up through all the weights of a chunk, from x[0] to all of x, z_x or y, where QUERIES;
    and what the chunk leaves of weights and momentum, where UPDATE. new_m and new_s may be m and s."""
    ARRAY: tl.constexpr = ROWS * WIDEST
    cells = grid(WIDEST, ROWS, TILE)
    rows = tl.arange(0, ROWS)
    alpha, beta = tl.load(vectors + rows), tl.load(vectors + ROWS + rows)
    last_mixing = tl.load(vectors + 2 * ROWS + rows)
    last_momentum_mixing = tl.load(vectors + 3 * ROWS + rows)
    last_alpha, last_beta = tl.load(vectors + count - 1), tl.load(vectors + ROWS + count - 1)
    last_p = tl.load(vectors + 4 * ROWS + count - 1)
    c = tl.load(mixing + grid(ROWS, ROWS, ROWS))
    for layer in range(DEPTH):
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        tile = grid(outer, TILE, TILE)
        at = layer * ARRAY
        if QUERIES:
            scores = c * row_products(x + at, a + at, inner, cells, ROWS, TILE, PRECISION)
        for j in range(0, outer, TILE):
            delta = tl.load(d + at + j + cells)
            if QUERIES:
                out = tl.dot(scores, delta, input_precision=PRECISION)
            for i in range(0, inner, TILE):
                w = tl.load(m + offset + i * outer + j + tile)
                update = tl.load(s + offset + i * outer + j + tile)
                if QUERIES:
                    query = tl.load(x + at + i + cells)
                    out = tl.dot(query * alpha[:, None], w, out, input_precision=PRECISION)
                    out = tl.dot(query * beta[:, None], update, out, input_precision=PRECISION)
                if UPDATE:
                    key = tl.trans(tl.load(a + at + i + cells))
                    w = tl.dot(
                        key,
                        delta * last_mixing[:, None],
                        last_alpha * w + last_beta * update,
                        input_precision=PRECISION,
                    )
                    update = tl.dot(
                        key, delta * last_momentum_mixing[:, None], last_p * update, input_precision=PRECISION
                    )
                    tl.debug_barrier()  # in place: no thread may still have to read what is written now
                    tl.store(new_m + offset + i * outer + j + tile, w)
                    tl.store(new_s + offset + i * outer + j + tile, update)
            if QUERIES:
                if layer == DEPTH - 1:
                    if WRITE_Y:
                        pointers, mask = token_block(y_base, y_stride, j, count, VALUE_WIDTH, ROWS, TILE)
                        tl.store(pointers, out.to(y_base.dtype.element_ty), mask=mask)
                else:
                    if KEEP_Z_X:
                        tl.store(z_x + at + j + cells, out)
                    tl.store(x + at + ARRAY + j + cells, silu(out))
        tl.debug_barrier()
