"""TTT-MLP's forward pass in Triton, and what its backward pass shares with it.

One program walks the sequence of one (batch, head). Letters, beside those of archs.ops.ttt_linear.plain and
archs.ops.ttt_mlp.plain:

    F    4 K hidden columns; both layers are walked in blocks of FB of them
    KP   K, and BT a chunk's tokens, padded to powers of two; BT >= 16 as tl.dot needs
    c    a chunk: a mini-batch, or BT tokens of one longer than that (CHUNKS of them a mini-batch)
    W, G the inner weights at the start of the mini-batch, and the open gradient, sum of lr_j grad_j
    P    this chunk's part of G: k~' h1 and X2~' h2
    s    token_scale of the chunk's rows; s_last that of the mini-batch's last token
    A1   tril(q~ k~'), A2 tril(X2~(q) X2~(k)'), with the bias's one added

On chip are a chunk's q, k, h2 and outputs (BT x KP) and one block of both layers (2 KP x FB). The weights
lie in global memory, where the L2 keeps them, and are read twice and written once a mini-batch: a first pass
over the hidden width gives Z2 and so h2, the second gives h1, the outputs and the new weights. The serial
chain is those two passes a mini-batch; `tl.debug_barrier` stands between a write and another thread's read,
and between the reads of a block and its writing.

Rows and columns that are padding hold zeros in q, k, h1 and h2, so that they add nothing anywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu_derivatives(z: tl.tensor) -> tl.tensor:
    """gelu(z), gelu'(z), gelu''(z) in the tanh form, as z sigmoid(p) with p = 2 u: no cancellation at 0."""
    scale: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
    cubic: tl.constexpr = 0.044715
    square = z * z
    s = 1 / (1 + tl.exp(-scale * z * (1 + cubic * square)))
    p1 = scale * (1 + 3 * cubic * square)
    p2 = 6 * scale * cubic * z
    w = s * (1 - s)
    return z * s, s + z * w * p1, w * (2 * p1 + z * ((1 - 2 * s) * p1 * p1 + p2))


@triton.jit
def normalise(z: tl.tensor, is_value: tl.tensor, eps: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """Rows of z (BT, KP), zero beyond K, without mean and at unit variance, and 1 / std (BT)."""
    centred = tl.where(is_value, z - (tl.sum(z, 1) / K)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / K + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def normalise_backward(
    d: tl.tensor, x: tl.tensor, rstd: tl.tensor, is_value: tl.tensor, K: tl.constexpr
) -> tl.tensor:
    """r (d - mean(d) - x mean(d x)) of rows: the gradient before a LayerNorm whose output is x."""
    mean, along = tl.sum(d, 1) / K, tl.sum(d * x, 1) / K
    return tl.where(is_value, (d - mean[:, None] - x * along[:, None]) * rstd[:, None], 0.0)


@triton.jit
def load_block(
    layer1: tl.tensor,
    layer2: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    F: tl.constexpr,
    KP: tl.constexpr,
    FB: tl.constexpr,
) -> tl.tensor:
    """Hidden columns start..start + FB of a head's W1 (K + 1, F) and W2 (F + 1, K), biases last:
    W1 (KP, FB), its bias (FB) and W2 (FB, KP)."""
    hidden, columns = start + tl.arange(0, FB), tl.arange(0, KP)
    mask1 = (columns[:, None] < K) & (hidden[None, :] < F)
    mask2 = (hidden[:, None] < F) & (columns[None, :] < K)
    weight1 = tl.load(layer1 + columns[:, None] * F + hidden[None, :], mask=mask1, other=0.0)
    bias1 = tl.load(layer1 + K * F + hidden, mask=hidden < F, other=0.0)
    weight2 = tl.load(layer2 + hidden[:, None] * K + columns[None, :], mask=mask2, other=0.0)
    return weight1, bias1, weight2


@triton.jit
def store_block(
    layer1: tl.tensor,
    layer2: tl.tensor,
    weight1: tl.tensor,
    bias1: tl.tensor,
    weight2: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    F: tl.constexpr,
    KP: tl.constexpr,
    FB: tl.constexpr,
) -> None:
    """Writes what `load_block` reads."""
    hidden, columns = start + tl.arange(0, FB), tl.arange(0, KP)
    mask1 = (columns[:, None] < K) & (hidden[None, :] < F)
    mask2 = (hidden[:, None] < F) & (columns[None, :] < K)
    tl.store(layer1 + columns[:, None] * F + hidden[None, :], weight1, mask=mask1)
    tl.store(layer1 + K * F + hidden, bias1, mask=hidden < F)
    tl.store(layer2 + hidden[:, None] * K + columns[None, :], weight2, mask=mask2)


@triton.jit(do_not_specialize=["num_tokens", "position", "first_chunk", "stop_chunk", "w_slots", "g_slots"])
def forward_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    lr_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    ln_weight_ptr: tl.tensor,
    ln_bias_ptr: tl.tensor,
    w1_in_ptr: tl.tensor,
    w2_in_ptr: tl.tensor,
    g1_in_ptr: tl.tensor,
    g2_in_ptr: tl.tensor,
    y_ptr: tl.tensor,
    w1_out_ptr: tl.tensor,
    w2_out_ptr: tl.tensor,
    g1_out_ptr: tl.tensor,
    g2_out_ptr: tl.tensor,
    z2_ptr: tl.tensor,
    zq2_ptr: tl.tensor,
    a2_ptr: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    position: tl.tensor,
    first_chunk: tl.tensor,
    stop_chunk: tl.tensor,
    eps: tl.tensor,
    w_slots: tl.tensor,
    g_slots: tl.tensor,
    MINI_BATCH: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    FB: tl.constexpr,
    BT: tl.constexpr,
    IS_RECOMPUTED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Chunks first_chunk..stop_chunk, counted from the start of the mini-batch that the call finds open; the
    first is the call's or a mini-batch's first. M programs, one a (batch, head).

    w1_in, w2_in are the weights of the first mini-batch, read from there until it closes and never written;
    g1_in, g2_in the open gradient at the call's first token. Without IS_RECOMPUTED, y is written, w_out holds
    the newest weights once a mini-batch has closed, and g_out the open gradient, zeros behind a closed one.
    With it, y is not written; mini-batch i leaves its weights in slot i of w_out (M, w_slots, ...), chunk c
    its gradient in slot c of g_out (M, g_slots, ...; in slot 0 where a mini-batch is one chunk), and its Z2,
    Z2(q) (BT, KP) and A2 (BT, BT) in z2, zq2, a2 (M, chunks, ...), for `backward_kernel`."""
    F: tl.constexpr = 4 * K
    CHUNKS: tl.constexpr = (MINI_BATCH + BT - 1) // BT
    SIZE1: tl.constexpr = (K + 1) * F
    SIZE2: tl.constexpr = (F + 1) * K
    m = tl.program_id(0).to(tl.int64)
    batch, head = m // num_heads, m % num_heads
    columns, rows = tl.arange(0, KP), tl.arange(0, BT)
    is_column = columns < K
    is_value = is_column[None, :]
    is_causal = rows[:, None] >= rows[None, :]
    s_last = tl.load(scale_ptr + MINI_BATCH - 1).to(tl.float32)
    ln_weight = tl.load(ln_weight_ptr + head * K + columns, mask=is_column, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + head * K + columns, mask=is_column, other=0.0).to(tl.float32)

    for chunk in range(first_chunk, stop_chunk):
        n = chunk // CHUNKS
        batch_row = chunk % CHUNKS * BT + rows  # position in the mini-batch
        t = n * MINI_BATCH + batch_row - position
        is_token = (batch_row < MINI_BATCH) & (t >= 0) & (t < num_tokens)
        closes = (chunk % CHUNKS == CHUNKS - 1) & ((n + 1) * MINI_BATCH <= position + num_tokens)
        is_first_of_call = chunk == position // BT
        has_open = is_first_of_call | (chunk % CHUNKS > 0)

        # where this chunk's weights and open gradient lie, and those after it
        n_here = n - first_chunk // CHUNKS
        w_slot = m * w_slots + (n_here if IS_RECOMPUTED else 0)
        g_slot = m * g_slots + (chunk - first_chunk if IS_RECOMPUTED and CHUNKS > 1 else 0)
        w1_after, w2_after = w1_out_ptr + w_slot * SIZE1, w2_out_ptr + w_slot * SIZE2
        g1_after, g2_after = g1_out_ptr + g_slot * SIZE1, g2_out_ptr + g_slot * SIZE2
        w1, w2, g1, g2 = w1_after, w2_after, g1_after, g2_after
        if IS_RECOMPUTED:
            w1, w2 = w1 - SIZE1, w2 - SIZE2
            if CHUNKS > 1:
                g1, g2 = g1 - SIZE1, g2 - SIZE2
        if n_here == 0:
            w1, w2 = w1_in_ptr + m * SIZE1, w2_in_ptr + m * SIZE2
        if is_first_of_call:
            g1, g2 = g1_in_ptr + m * SIZE1, g2_in_ptr + m * SIZE2
        tl.debug_barrier()  # the last chunk's writes are done

        index = (batch * num_tokens + t) * num_heads + head
        offset = index[:, None] * K + columns[None, :]
        mask = is_token[:, None] & is_value
        q = tl.load(q_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        lr = tl.load(lr_ptr + index, mask=is_token, other=0.0).to(tl.float32)
        s = tl.load(scale_ptr + batch_row, mask=is_token, other=0.0).to(tl.float32)
        bias2 = tl.load(w2 + F * K + columns, mask=is_column, other=0.0)

        z2 = tl.zeros((BT, KP), tl.float32)
        for start in range(0, F, FB):
            weight1, bias1, weight2 = load_block(w1, w2, start, K, F, KP, FB)
            z1 = tl.dot(k, weight1, input_precision=PRECISION) + bias1[None, :]
            x2, _, _ = gelu_derivatives(z1)
            z2 = tl.dot(x2, weight2, z2, input_precision=PRECISION)
        z2 += bias2[None, :]
        x, rstd = normalise(z2, is_value, eps, K)
        outer = lr[:, None] * ln_weight * (ln_weight * x + ln_bias - v + k)
        h2 = tl.where(mask, normalise_backward(outer, x, rstd, is_value, K), 0.0)

        a1 = tl.where(is_causal, tl.dot(q, tl.trans(k), input_precision=PRECISION) + 1.0, 0.0)
        a1 *= s[:, None]
        a2 = tl.zeros((BT, BT), tl.float32)
        zq2 = tl.zeros((BT, KP), tl.float32)
        for start in range(0, F, FB):
            weight1, bias1, weight2 = load_block(w1, w2, start, K, F, KP, FB)
            z1 = tl.dot(k, weight1, input_precision=PRECISION) + bias1[None, :]
            x2, slope, _ = gelu_derivatives(z1)
            h1 = tl.dot(h2, tl.trans(weight2), input_precision=PRECISION) * slope
            part1 = tl.dot(tl.trans(k), h1, input_precision=PRECISION)
            part_b = tl.sum(h1, 0)
            part2 = tl.dot(tl.trans(x2), h2, input_precision=PRECISION)
            zq1 = tl.dot(q, weight1, input_precision=PRECISION) + bias1[None, :]
            zq1 -= tl.dot(a1, h1, input_precision=PRECISION)
            if has_open:
                open1, open_b, open2 = load_block(g1, g2, start, K, F, KP, FB)
                part1, part_b, part2 = part1 + open1, part_b + open_b, part2 + open2
                zq1 -= s[:, None] * (tl.dot(q, open1, input_precision=PRECISION) + open_b[None, :])
                xq, _, _ = gelu_derivatives(zq1)
                zq2 -= s[:, None] * tl.dot(xq, open2, input_precision=PRECISION)
            xq, _, _ = gelu_derivatives(zq1)
            zq2 = tl.dot(xq, weight2, zq2, input_precision=PRECISION)
            a2 = tl.dot(xq, tl.trans(x2), a2, input_precision=PRECISION)
            tl.debug_barrier()  # the block is read
            if closes:
                weight1, bias1 = weight1 - s_last * part1, bias1 - s_last * part_b
                weight2 -= s_last * part2
                store_block(w1_after, w2_after, weight1, bias1, weight2, start, K, F, KP, FB)
                part1, part2 = tl.zeros((KP, FB), tl.float32), tl.zeros((FB, KP), tl.float32)
                part_b = tl.zeros((FB,), tl.float32)
            if (closes == 0) | (chunk == stop_chunk - 1):
                store_block(g1_after, g2_after, part1, part_b, part2, start, K, F, KP, FB)

        a2 = tl.where(is_causal, a2 + 1.0, 0.0)
        zq2 += bias2[None, :] - s[:, None] * tl.dot(a2, h2, input_precision=PRECISION)
        part2_b = tl.sum(h2, 0)
        if has_open:
            open2_b = tl.load(g2 + F * K + columns, mask=is_column, other=0.0)
            part2_b += open2_b
            zq2 -= s[:, None] * open2_b[None, :]
        tl.debug_barrier()  # the biases are read
        if closes:
            tl.store(w2_after + F * K + columns, bias2 - s_last * part2_b, mask=is_column)
            part2_b = tl.zeros((KP,), tl.float32)
        if (closes == 0) | (chunk == stop_chunk - 1):
            tl.store(g2_after + F * K + columns, part2_b, mask=is_column)

        if IS_RECOMPUTED:
            saved = m * (stop_chunk - first_chunk) + chunk - first_chunk
            square = saved * BT * BT + rows[:, None] * BT + rows[None, :]
            wide = saved * BT * KP + rows[:, None] * KP + columns[None, :]
            tl.store(a2_ptr + square, a2)
            tl.store(z2_ptr + wide, z2)
            tl.store(zq2_ptr + wide, zq2)
        else:
            xq2, _ = normalise(zq2, is_value, eps, K)
            y = q + ln_weight * xq2 + ln_bias
            tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)
