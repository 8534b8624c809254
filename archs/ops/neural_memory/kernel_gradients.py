"""The backward passes through the layers of one chunk. Names as in kernel_tiles; g_ before a name is the
gradient of the outer loss with respect to it. The formulas are scan.py's."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from archs.ops.neural_memory.kernel_tiles import (
    grid,
    layer_shape,
    row_products,
    silu_curvature,
    silu_slope,
    times,
    times_transposed,
    token_block,
)


@triton.jit
def layers_backward(
    g_q_base,
    k_stride,
    count,
    mixing,
    vectors,
    g_mixing,
    g_vectors,
    m,
    s,
    g_m,
    g_s,
    a,
    d,
    x,
    z_x,
    g_out,
    g_d,
    g_a,
    KEY_WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Through `layers`, from g_out of the last layer, g_m and g_s after the chunk: every layer's g_out, the
    gradients of q and of the coefficients (but for what the carried weights and momentum add to their last
    rows), and, as far as they come this way, g_d and g_a."""
    ARRAY: tl.constexpr = ROWS * WIDEST
    cells = grid(WIDEST, ROWS, TILE)
    rows = tl.arange(0, ROWS)
    alpha, beta = tl.load(vectors + rows), tl.load(vectors + ROWS + rows)
    last_mixing = tl.load(vectors + 2 * ROWS + rows)
    last_momentum_mixing = tl.load(vectors + 3 * ROWS + rows)
    square = grid(ROWS, ROWS, ROWS)
    c, c_t = tl.load(mixing + square), tl.load(mixing + rows[None, :] * ROWS + rows[:, None])
    g_c = tl.full((ROWS, ROWS), 0.0, tl.float32)
    g_alpha = tl.full((ROWS,), 0.0, tl.float32)
    g_beta = tl.full((ROWS,), 0.0, tl.float32)
    g_last_mixing = tl.full((ROWS,), 0.0, tl.float32)
    g_last_momentum_mixing = tl.full((ROWS,), 0.0, tl.float32)
    for step in range(DEPTH):
        layer = DEPTH - 1 - step
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        tile = grid(outer, TILE, TILE)
        at = layer * ARRAY
        products = row_products(x + at, a + at, inner, cells, ROWS, TILE, PRECISION)
        g_scores = row_products(g_out + at, d + at, outer, cells, ROWS, TILE, PRECISION)
        g_c += g_scores * products
        g_products = c * g_scores
        # Triton has transposed a product's result wrongly where it is a left operand: products of their own.
        scores_t = c_t * row_products(a + at, x + at, inner, cells, ROWS, TILE, PRECISION)
        g_products_t = c_t * row_products(d + at, g_out + at, outer, cells, ROWS, TILE, PRECISION)
        for j in range(0, outer, TILE):
            over_m = times(a + at, g_m + offset, j, inner, outer, cells, tile, ROWS, TILE, PRECISION)
            over_s = times(a + at, g_s + offset, j, inner, outer, cells, tile, ROWS, TILE, PRECISION)
            delta = tl.load(d + at + j + cells)
            g_last_mixing += tl.sum(delta * over_m, axis=1)
            g_last_momentum_mixing += tl.sum(delta * over_s, axis=1)
            out = last_mixing[:, None] * over_m + last_momentum_mixing[:, None] * over_s
            g_output = tl.load(g_out + at + j + cells)
            out = tl.dot(scores_t, g_output, out, input_precision=PRECISION)
            tl.store(g_d + at + j + cells, out)
        for i in range(0, inner, TILE):
            over_m = times_transposed(d + at, g_m + offset, i, outer, cells, tile, ROWS, TILE, PRECISION)
            # Scaling a product's rows after it is scaling its left side's rows before it.
            over_s = times_transposed(d + at, g_s + offset, i, outer, cells, tile, ROWS, TILE, PRECISION)
            query = tl.load(x + at + i + cells)
            out = last_mixing[:, None] * over_m + last_momentum_mixing[:, None] * over_s
            out = tl.dot(g_products_t, query, out, input_precision=PRECISION)
            tl.store(g_a + at + i + cells, out)
            over_m = times_transposed(g_out + at, m + offset, i, outer, cells, tile, ROWS, TILE, PRECISION)
            over_s = times_transposed(g_out + at, s + offset, i, outer, cells, tile, ROWS, TILE, PRECISION)
            g_alpha += tl.sum(query * over_m, axis=1)
            g_beta += tl.sum(query * over_s, axis=1)
            out = alpha[:, None] * over_m + beta[:, None] * over_s
            key = tl.load(a + at + i + cells)
            out = tl.dot(g_products, key, out, input_precision=PRECISION)
            if layer == 0:
                pointers, mask = token_block(g_q_base, k_stride, i, count, KEY_WIDTH, ROWS, TILE)
                tl.store(pointers, out.to(g_q_base.dtype.element_ty), mask=mask)
            else:
                slope = silu_slope(tl.load(z_x + at - ARRAY + i + cells))
                tl.store(g_out + at - ARRAY + i + cells, out * slope)
        tl.debug_barrier()
    tl.store(g_mixing + square, g_c)
    tl.store(g_vectors + rows, g_alpha)
    tl.store(g_vectors + ROWS + rows, g_beta)
    tl.store(g_vectors + 2 * ROWS + rows, g_last_mixing)
    tl.store(g_vectors + 3 * ROWS + rows, g_last_momentum_mixing)


@triton.jit
def keys_backward(
    g_k_base,
    g_v_base,
    k_stride,
    v_stride,
    count,
    w,
    z,
    u,
    g_d,
    g_a,
    g_u,
    g_z,
    KEY_WIDTH: tl.constexpr,
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
    """Through `keys`, from g_d and g_a: the gradients of k and v, g_u of every layer but the first (at its
    index), and every layer's whole gradient of z, which takes the place of g_d."""
    ARRAY: tl.constexpr = ROWS * WIDEST
    cells = grid(WIDEST, ROWS, TILE)
    for layer in range(DEPTH):
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        tile = grid(outer, TILE, TILE)
        at = layer * ARRAY
        for j in range(0, outer, TILE):
            out = tl.load(g_d + at + j + cells)
            if layer > 0:
                out += times(g_u + at, w + offset, j, inner, outer, cells, tile, ROWS, TILE, PRECISION)
            if layer == DEPTH - 1:
                pointers, mask = token_block(g_v_base, v_stride, j, count, VALUE_WIDTH, ROWS, TILE)
                tl.store(pointers, (-2 * out).to(g_v_base.dtype.element_ty), mask=mask)
                tl.store(g_z + at + j + cells, 2 * out)
            else:
                output = tl.load(z + at + j + cells)
                unsloped = tl.load(u + at + j + cells)
                g_unsloped = g_u + at + ARRAY + j + cells
                tl.store(g_unsloped, out * silu_slope(output))
                tl.store(g_z + at + j + cells, out * unsloped * silu_curvature(output))
        tl.debug_barrier()
    # g_d is read no more: it takes the whole g_z, of the last layer that there is already.
    top = (DEPTH - 1) * ARRAY
    for j in range(0, V, TILE):
        out = tl.load(g_z + top + j + cells)
        tl.store(g_d + top + j + cells, out)
    tl.debug_barrier()
    for step in range(DEPTH):
        layer = DEPTH - 1 - step
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        tile = grid(outer, TILE, TILE)
        at = layer * ARRAY
        for i in range(0, inner, TILE):
            out = times_transposed(g_d + at, w + offset, i, outer, cells, tile, ROWS, TILE, PRECISION)
            out += tl.load(g_a + at + i + cells)
            if layer == 0:
                pointers, mask = token_block(g_k_base, k_stride, i, count, KEY_WIDTH, ROWS, TILE)
                tl.store(pointers, out.to(g_k_base.dtype.element_ty), mask=mask)
            else:
                below = z + at - ARRAY + i + cells
                so_far = tl.load(g_z + at - ARRAY + i + cells)
                whole = so_far + out * silu_slope(tl.load(below))
                tl.store(g_d + at - ARRAY + i + cells, whole)
        tl.debug_barrier()


@triton.jit
def carried_backward(
    vectors,
    g_vectors,
    count,
    m,
    s,
    g_m,
    g_s,
    g_start,
    a,
    d,
    x,
    g_out,
    g_u,
    g_z,
    is_start,
    HAS_START: tl.constexpr,
    DEPTH: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g_m and g_s from after the chunk to before it, in place, and what the carried weights and momentum
    add to the gradients of the coefficients. Where is_start, the gradient of the weights at which the keys'
    gradients were taken goes to g_start and not to g_m."""
    ARRAY: tl.constexpr = ROWS * WIDEST
    cells = grid(WIDEST, ROWS, TILE)
    rows = tl.arange(0, ROWS)
    alpha, beta = tl.load(vectors + rows), tl.load(vectors + ROWS + rows)
    last_alpha, last_beta = tl.load(vectors + count - 1), tl.load(vectors + ROWS + count - 1)
    last_p = tl.load(vectors + 4 * ROWS + count - 1)
    with_m = tl.full((TILE,), 0.0, tl.float32)
    with_s = tl.full((TILE,), 0.0, tl.float32)
    with_p = tl.full((TILE,), 0.0, tl.float32)
    for layer in range(DEPTH):
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        tile = grid(outer, TILE, TILE)
        at = layer * ARRAY
        for j in range(0, outer, TILE):
            g_output = tl.load(g_out + at + j + cells)
            delta = tl.load(d + at + j + cells)
            g_outer = tl.load(g_z + at + j + cells)
            for i in range(0, inner, TILE):
                query = tl.load(x + at + i + cells)
                key = tl.load(a + at + i + cells)
                g_weight = tl.load(g_m + offset + i * outer + j + tile)
                g_update = tl.load(g_s + offset + i * outer + j + tile)
                weight = tl.load(m + offset + i * outer + j + tile)
                update = tl.load(s + offset + i * outer + j + tile)
                with_m += tl.sum(g_weight * weight, axis=0)
                with_s += tl.sum(g_weight * update, axis=0)
                with_p += tl.sum(g_update * update, axis=0)
                through_keys = tl.dot(tl.trans(key), g_outer, input_precision=PRECISION)
                if layer > 0:
                    g_unsloped = tl.load(g_u + at + i + cells)
                    through_keys = tl.dot(
                        tl.trans(g_unsloped), delta, through_keys, input_precision=PRECISION
                    )
                g_update = last_beta * g_weight + last_p * g_update
                g_weight = last_alpha * g_weight
                by_alpha, by_beta = tl.trans(query * alpha[:, None]), tl.trans(query * beta[:, None])
                g_weight = tl.dot(by_alpha, g_output, g_weight, input_precision=PRECISION)
                g_update = tl.dot(by_beta, g_output, g_update, input_precision=PRECISION)
                tl.debug_barrier()  # in place: no thread may still have to read what is written now
                tl.store(g_s + offset + i * outer + j + tile, g_update)
                if HAS_START:
                    if is_start:
                        tl.store(g_start + offset + i * outer + j + tile, through_keys)
                    else:
                        g_weight += through_keys
                else:
                    g_weight += through_keys
                tl.store(g_m + offset + i * outer + j + tile, g_weight)
    # The last of alpha, beta and p, of which the first two have gradients by the queries already.
    is_last = rows == count - 1
    g_alpha, g_beta = tl.load(g_vectors + rows), tl.load(g_vectors + ROWS + rows)
    tl.debug_barrier()
    tl.store(g_vectors + rows, g_alpha + tl.where(is_last, tl.sum(with_m), 0.0))
    tl.store(g_vectors + ROWS + rows, g_beta + tl.where(is_last, tl.sum(with_s), 0.0))
    tl.store(g_vectors + 4 * ROWS + rows, tl.where(is_last, tl.sum(with_p), 0.0))
    tl.debug_barrier()
