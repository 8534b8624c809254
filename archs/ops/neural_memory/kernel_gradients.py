"""The backward passes through the layers of one chunk. Names as in kernel_tiles; g_ before a name is the
gradient of the outer loss with respect to it. The formulas are scan.py's."""

import triton
import triton.language as tl

from archs.ops.neural_memory.kernel_tiles import (
    block,
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
    rows = tl.arange(0, ROWS)
    alpha, beta = tl.load(vectors + rows), tl.load(vectors + ROWS + rows)
    last_mixing = tl.load(vectors + 2 * ROWS + rows)
    last_momentum_mixing = tl.load(vectors + 3 * ROWS + rows)
    c = tl.load(block(mixing, 0, 0, ROWS, ROWS, ROWS))
    g_c = tl.zeros((ROWS, ROWS), tl.float32)
    g_alpha = tl.zeros((ROWS,), tl.float32)
    g_beta = tl.zeros((ROWS,), tl.float32)
    g_last_mixing = tl.zeros((ROWS,), tl.float32)
    g_last_momentum_mixing = tl.zeros((ROWS,), tl.float32)
    for step in range(DEPTH):
        layer = DEPTH - 1 - step
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        at = layer * ARRAY
        products = row_products(x + at, a + at, inner, ROWS, WIDEST, TILE, PRECISION)
        g_scores = row_products(g_out + at, d + at, outer, ROWS, WIDEST, TILE, PRECISION)
        g_c += g_scores * products
        scores = tl.trans(c * products)
        g_products = c * g_scores
        for j in range(0, outer, TILE):
            over_m = times(a + at, g_m + offset, j, inner, outer, ROWS, WIDEST, TILE, PRECISION)
            over_s = times(a + at, g_s + offset, j, inner, outer, ROWS, WIDEST, TILE, PRECISION)
            delta = tl.load(block(d + at, 0, j, WIDEST, ROWS, TILE))
            g_last_mixing += tl.sum(delta * over_m, axis=1)
            g_last_momentum_mixing += tl.sum(delta * over_s, axis=1)
            out = last_mixing[:, None] * over_m + last_momentum_mixing[:, None] * over_s
            g_output = tl.load(block(g_out + at, 0, j, WIDEST, ROWS, TILE))
            out = tl.dot(scores, g_output, out, input_precision=PRECISION)
            tl.store(block(g_d + at, 0, j, WIDEST, ROWS, TILE), out)
        for i in range(0, inner, TILE):
            over_m = times_transposed(d + at, g_m + offset, i, outer, ROWS, WIDEST, TILE, PRECISION)
            # Scaling a product's rows after it is scaling its left side's rows before it.
            over_s = times_transposed(d + at, g_s + offset, i, outer, ROWS, WIDEST, TILE, PRECISION)
            query = tl.load(block(x + at, 0, i, WIDEST, ROWS, TILE))
            out = last_mixing[:, None] * over_m + last_momentum_mixing[:, None] * over_s
            out = tl.dot(tl.trans(g_products), query, out, input_precision=PRECISION)
            tl.store(block(g_a + at, 0, i, WIDEST, ROWS, TILE), out)
            over_m = times_transposed(g_out + at, m + offset, i, outer, ROWS, WIDEST, TILE, PRECISION)
            over_s = times_transposed(g_out + at, s + offset, i, outer, ROWS, WIDEST, TILE, PRECISION)
            g_alpha += tl.sum(query * over_m, axis=1)
            g_beta += tl.sum(query * over_s, axis=1)
            out = alpha[:, None] * over_m + beta[:, None] * over_s
            key = tl.load(block(a + at, 0, i, WIDEST, ROWS, TILE))
            out = tl.dot(g_products, key, out, input_precision=PRECISION)
            if layer == 0:
                pointers, mask = token_block(g_q_base, k_stride, i, count, KEY_WIDTH, ROWS, TILE)
                tl.store(pointers, out.to(g_q_base.dtype.element_ty), mask=mask)
            else:
                slope = silu_slope(tl.load(block(z_x + at - ARRAY, 0, i, WIDEST, ROWS, TILE)))
                tl.store(block(g_out + at - ARRAY, 0, i, WIDEST, ROWS, TILE), out * slope)
        tl.debug_barrier()
    tl.store(block(g_mixing, 0, 0, ROWS, ROWS, ROWS), g_c)
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
    for layer in range(DEPTH):
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        at = layer * ARRAY
        for j in range(0, outer, TILE):
            out = tl.load(block(g_d + at, 0, j, WIDEST, ROWS, TILE))
            if layer > 0:
                out += times(g_u + at, w + offset, j, inner, outer, ROWS, WIDEST, TILE, PRECISION)
            if layer == DEPTH - 1:
                pointers, mask = token_block(g_v_base, v_stride, j, count, VALUE_WIDTH, ROWS, TILE)
                tl.store(pointers, (-2 * out).to(g_v_base.dtype.element_ty), mask=mask)
                tl.store(block(g_z + at, 0, j, WIDEST, ROWS, TILE), 2 * out)
            else:
                output = tl.load(block(z + at, 0, j, WIDEST, ROWS, TILE))
                unsloped = tl.load(block(u + at, 0, j, WIDEST, ROWS, TILE))
                g_unsloped = block(g_u + at + ARRAY, 0, j, WIDEST, ROWS, TILE)
                tl.store(g_unsloped, out * silu_slope(output))
                tl.store(block(g_z + at, 0, j, WIDEST, ROWS, TILE), out * unsloped * silu_curvature(output))
        tl.debug_barrier()
    # g_d is read no more: it takes the whole g_z, of the last layer that there is already.
    top = (DEPTH - 1) * ARRAY
    for j in range(0, V, TILE):
        out = tl.load(block(g_z + top, 0, j, WIDEST, ROWS, TILE))
        tl.store(block(g_d + top, 0, j, WIDEST, ROWS, TILE), out)
    tl.debug_barrier()
    for step in range(DEPTH):
        layer = DEPTH - 1 - step
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        at = layer * ARRAY
        for i in range(0, inner, TILE):
            out = times_transposed(g_d + at, w + offset, i, outer, ROWS, WIDEST, TILE, PRECISION)
            out += tl.load(block(g_a + at, 0, i, WIDEST, ROWS, TILE))
            if layer == 0:
                pointers, mask = token_block(g_k_base, k_stride, i, count, KEY_WIDTH, ROWS, TILE)
                tl.store(pointers, out.to(g_k_base.dtype.element_ty), mask=mask)
            else:
                below = block(z + at - ARRAY, 0, i, WIDEST, ROWS, TILE)
                so_far = tl.load(block(g_z + at - ARRAY, 0, i, WIDEST, ROWS, TILE))
                whole = so_far + out * silu_slope(tl.load(below))
                tl.store(block(g_d + at - ARRAY, 0, i, WIDEST, ROWS, TILE), whole)
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
    rows = tl.arange(0, ROWS)
    alpha, beta = tl.load(vectors + rows), tl.load(vectors + ROWS + rows)
    last_alpha, last_beta = tl.load(vectors + count - 1), tl.load(vectors + ROWS + count - 1)
    last_p = tl.load(vectors + 4 * ROWS + count - 1)
    with_m = tl.zeros((TILE,), tl.float32)
    with_s = tl.zeros((TILE,), tl.float32)
    with_p = tl.zeros((TILE,), tl.float32)
    for layer in range(DEPTH):
        inner, outer, offset = layer_shape(layer, DEPTH, K, F, V, TILE)
        at = layer * ARRAY
        for j in range(0, outer, TILE):
            g_output = tl.load(block(g_out + at, 0, j, WIDEST, ROWS, TILE))
            delta = tl.load(block(d + at, 0, j, WIDEST, ROWS, TILE))
            g_outer = tl.load(block(g_z + at, 0, j, WIDEST, ROWS, TILE))
            for i in range(0, inner, TILE):
                query = tl.load(block(x + at, 0, i, WIDEST, ROWS, TILE))
                key = tl.load(block(a + at, 0, i, WIDEST, ROWS, TILE))
                g_weight = tl.load(block(g_m + offset, i, j, outer, TILE, TILE))
                g_update = tl.load(block(g_s + offset, i, j, outer, TILE, TILE))
                weight = tl.load(block(m + offset, i, j, outer, TILE, TILE))
                update = tl.load(block(s + offset, i, j, outer, TILE, TILE))
                with_m += tl.sum(g_weight * weight, axis=0)
                with_s += tl.sum(g_weight * update, axis=0)
                with_p += tl.sum(g_update * update, axis=0)
                through_keys = tl.dot(tl.trans(key), g_outer, input_precision=PRECISION)
                if layer > 0:
                    g_unsloped = tl.load(block(g_u + at, 0, i, WIDEST, ROWS, TILE))
                    through_keys = tl.dot(tl.trans(g_unsloped), delta, through_keys, input_precision=PRECISION)
                g_update = last_beta * g_weight + last_p * g_update
                g_weight = last_alpha * g_weight
                by_alpha, by_beta = tl.trans(query * alpha[:, None]), tl.trans(query * beta[:, None])
                g_weight = tl.dot(by_alpha, g_output, g_weight, input_precision=PRECISION)
                g_update = tl.dot(by_beta, g_output, g_update, input_precision=PRECISION)
                tl.debug_barrier()  # in place: no thread may still have to read what is written now
                tl.store(block(g_s + offset, i, j, outer, TILE, TILE), g_update)
                if HAS_START:
                    if is_start:
                        tl.store(block(g_start + offset, i, j, outer, TILE, TILE), through_keys)
                    else:
                        g_weight += through_keys
                else:
                    g_weight += through_keys
                tl.store(block(g_m + offset, i, j, outer, TILE, TILE), g_weight)
    # The last of alpha, beta and p, of which the first two have gradients by the queries already.
    is_last = rows == count - 1
    g_alpha, g_beta = tl.load(g_vectors + rows), tl.load(g_vectors + ROWS + rows)
    tl.debug_barrier()
    tl.store(g_vectors + rows, g_alpha + tl.where(is_last, tl.sum(with_m), 0.0))
    tl.store(g_vectors + ROWS + rows, g_beta + tl.where(is_last, tl.sum(with_s), 0.0))
    tl.store(g_vectors + 4 * ROWS + rows, tl.where(is_last, tl.sum(with_p), 0.0))
    tl.debug_barrier()
