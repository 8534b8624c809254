"""One token without gradients, in one launch: one program a head of a sequence, which reads weights and
momentum twice and once and writes each once. The recurrences as they stand; every product is a vector's with
a tile of a matrix, summed in float32. Names as in kernel_tiles, of one token: arrays are (DEPTH, WIDEST)."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def of_layer(layer: tl.constexpr, first, second, third, fourth):
    """A layer's tensor; those past the last layer are not used."""
    chosen = first
    if layer == 1:
        chosen = second
    if layer == 2:
        chosen = third
    if layer == 3:
        chosen = fourth
    return chosen


@triton.jit
def tile_of(i, j, INNER: tl.constexpr, OUTER: tl.constexpr, TILE: tl.constexpr):
    """Where a tile's elements are in a matrix (INNER, OUTER), and which there are."""
    rows, columns = i + tl.arange(0, TILE), j + tl.arange(0, TILE)
    mask = (rows < INNER)[:, None] & (columns < OUTER)[None, :]
    return rows[:, None] * OUTER + columns[None, :], mask


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    step_size_ptr,
    momentum_ptr,
    w0,
    w1,
    w2,
    w3,
    m0,
    m1,
    m2,
    m3,
    s0,
    s1,
    s2,
    s3,
    new_m0,
    new_m1,
    new_m2,
    new_m3,
    new_s0,
    new_s1,
    new_s2,
    new_s3,
    arrays_ptr,
    y_ptr,
    KEY_WIDTH: tl.constexpr,
    HIDDEN_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """q, k, v (B H, width), gates (B H,), and of every layer the weights before the chunk w, the weights m
    and the momentum s -> y (B H, V), new_m and new_s. Matrices are (B H, in, out)."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    a = arrays_ptr + program * 4 * DEPTH * WIDEST
    z, d, x = a + DEPTH * WIDEST, a + 2 * DEPTH * WIDEST, a + 3 * DEPTH * WIDEST
    keep = 1 - tl.load(decay_ptr + program).to(tl.float32)
    step_size = tl.load(step_size_ptr + program).to(tl.float32)
    momentum = tl.load(momentum_ptr + program).to(tl.float32)
    for i in range(0, KEY_WIDTH, TILE):
        mask = i + columns < KEY_WIDTH
        at = program * KEY_WIDTH + i + columns
        tl.store(a + i + columns, tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32))
        tl.store(x + i + columns, tl.load(q_ptr + at, mask=mask, other=0.0).to(tl.float32))
    tl.debug_barrier()
    # The key up.
    for layer in tl.static_range(DEPTH):
        INNER = KEY_WIDTH if layer == 0 else HIDDEN_WIDTH
        OUTER = VALUE_WIDTH if layer == DEPTH - 1 else HIDDEN_WIDTH
        w = of_layer(layer, w0, w1, w2, w3) + program * INNER * OUTER
        for j in range(0, OUTER, TILE):
            out = tl.full((TILE,), 0.0, tl.float32)
            for i in range(0, INNER, TILE):
                at, mask = tile_of(i, j, INNER, OUTER, TILE)
                key = tl.load(a + layer * WIDEST + i + columns)
                out += tl.sum(key[:, None] * tl.load(w + at, mask=mask, other=0.0), axis=0)
            if layer == DEPTH - 1:
                mask = j + columns < VALUE_WIDTH
                v = tl.load(v_ptr + program * VALUE_WIDTH + j + columns, mask=mask, other=0.0)
                tl.store(d + layer * WIDEST + j + columns, 2 * (out - v.to(tl.float32)))
            else:
                tl.store(z + layer * WIDEST + j + columns, out)
                tl.store(a + (layer + 1) * WIDEST + j + columns, out / (1 + tl.exp(-out)))
        tl.debug_barrier()
    # Its deltas down.
    for step in tl.static_range(DEPTH - 1):
        layer = DEPTH - 1 - step
        OUTER = VALUE_WIDTH if layer == DEPTH - 1 else HIDDEN_WIDTH
        w = of_layer(layer, w0, w1, w2, w3) + program * HIDDEN_WIDTH * OUTER
        for i in range(0, HIDDEN_WIDTH, TILE):
            out = tl.full((TILE,), 0.0, tl.float32)
            for j in range(0, OUTER, TILE):
                at, mask = tile_of(i, j, HIDDEN_WIDTH, OUTER, TILE)
                delta = tl.load(d + layer * WIDEST + j + columns)
                out += tl.sum(delta[None, :] * tl.load(w + at, mask=mask, other=0.0), axis=1)
            output = tl.load(z + (layer - 1) * WIDEST + i + columns)
            gate = 1 / (1 + tl.exp(-output))
            slope = gate + output * gate * (1 - gate)
            tl.store(d + (layer - 1) * WIDEST + i + columns, out * slope)
        tl.debug_barrier()
    # The step, and the query up through its result.
    for layer in tl.static_range(DEPTH):
        INNER = KEY_WIDTH if layer == 0 else HIDDEN_WIDTH
        OUTER = VALUE_WIDTH if layer == DEPTH - 1 else HIDDEN_WIDTH
        m = of_layer(layer, m0, m1, m2, m3) + program * INNER * OUTER
        s = of_layer(layer, s0, s1, s2, s3) + program * INNER * OUTER
        new_m = of_layer(layer, new_m0, new_m1, new_m2, new_m3) + program * INNER * OUTER
        new_s = of_layer(layer, new_s0, new_s1, new_s2, new_s3) + program * INNER * OUTER
        for j in range(0, OUTER, TILE):
            delta = -step_size * tl.load(d + layer * WIDEST + j + columns)
            out = tl.full((TILE,), 0.0, tl.float32)
            for i in range(0, INNER, TILE):
                at, mask = tile_of(i, j, INNER, OUTER, TILE)
                key = tl.load(a + layer * WIDEST + i + columns)
                update = momentum * tl.load(s + at, mask=mask, other=0.0) + key[:, None] * delta[None, :]
                weight = keep * tl.load(m + at, mask=mask, other=0.0) + update
                tl.store(new_s + at, update, mask=mask)
                tl.store(new_m + at, weight, mask=mask)
                query = tl.load(x + layer * WIDEST + i + columns)
                out += tl.sum(query[:, None] * weight, axis=0)
            if layer == DEPTH - 1:
                mask = j + columns < VALUE_WIDTH
                at_y = y_ptr + program * VALUE_WIDTH + j + columns
                tl.store(at_y, out.to(y_ptr.dtype.element_ty), mask=mask)
            else:
                tl.store(x + (layer + 1) * WIDEST + j + columns, out / (1 + tl.exp(-out)))
        tl.debug_barrier()
