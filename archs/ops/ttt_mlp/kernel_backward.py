"""TTT-MLP's backward pass in Triton: one program a (batch, head) walks a group's chunks backward.

Letters of archs.ops.ttt_mlp.kernel_forward, and, with d x the gradient with respect to x:

    D    d of the weights after the chunk where it closes its mini-batch, else d of the gradient G after it
    E    d of G + P, which are -s_last D where the chunk closes its mini-batch, else D
    e, f d Z2(q), d Z1(q)
    g    d h1;  u = h2 W2', so that h1 = u gelu'(Z1)

The weights before each mini-batch, the open gradients, Z2, Z2(q) and A2 come from `forward_kernel`, run
again over the group. A first pass over the hidden width gives all of d h2, and so d Z2; the second gives
d Z1. The gradients of the weights lie in global memory, as the weights do, and are read twice and written
once a chunk; what the second pass needs of the first goes through a scratch of 4 BT F numbers a program. On
chip are about ten BT x KP tensors of the chunk and a block each of both layers and their gradients
(4 KP x FB). The serial chain is the two passes a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from archs.ops.ttt_mlp.kernel_forward import (
    gelu_derivatives,
    load_block,
    normalise,
    normalise_backward,
    store_block,
)


@triton.jit(do_not_specialize=["num_tokens", "position", "first_chunk", "stop_chunk", "w_slots", "g_slots"])
def backward_kernel(
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
    w1_slots_ptr: tl.tensor,
    w2_slots_ptr: tl.tensor,
    g1_slots_ptr: tl.tensor,
    g2_slots_ptr: tl.tensor,
    z2_ptr: tl.tensor,
    zq2_ptr: tl.tensor,
    a2_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    dw1_ptr: tl.tensor,
    dw2_ptr: tl.tensor,
    dg1_ptr: tl.tensor,
    dg2_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    dlr_ptr: tl.tensor,
    ds_ptr: tl.tensor,
    d_ln_weight_ptr: tl.tensor,
    d_ln_bias_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
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
    PRECISION: tl.constexpr,
) -> None:
    """Chunks stop_chunk - 1 down to first_chunk, the arguments as `forward_kernel` had them with
    IS_RECOMPUTED; its outputs are the slots here. dw, dg (M, ...) and d_ln_weight, d_ln_bias (M, K), float32,
    hold what is known from the chunks behind, and are updated in place; dq, dk, dv (B, T, H, K), dlr and ds
    (B, T, H) are written, ds the gradient of each token's token_scale; scratch (M, 4, BT, F)."""
    F: tl.constexpr = 4 * K
    CHUNKS: tl.constexpr = (MINI_BATCH + BT - 1) // BT
    SIZE1: tl.constexpr = (K + 1) * F
    SIZE2: tl.constexpr = (F + 1) * K
    FP: tl.constexpr = (F + FB - 1) // FB * FB
    m = tl.program_id(0).to(tl.int64)
    batch, head = m // num_heads, m % num_heads
    columns, rows = tl.arange(0, KP), tl.arange(0, BT)
    is_column = columns < K
    is_value = is_column[None, :]
    is_causal = rows[:, None] >= rows[None, :]
    s_last = tl.load(scale_ptr + MINI_BATCH - 1).to(tl.float32)
    ln_weight = tl.load(ln_weight_ptr + head * K + columns, mask=is_column, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + head * K + columns, mask=is_column, other=0.0).to(tl.float32)
    d_ln_weight = tl.load(d_ln_weight_ptr + m * K + columns, mask=is_column, other=0.0)
    d_ln_bias = tl.load(d_ln_bias_ptr + m * K + columns, mask=is_column, other=0.0)
    dw1, dw2, dg1, dg2 = dw1_ptr + m * SIZE1, dw2_ptr + m * SIZE2, dg1_ptr + m * SIZE1, dg2_ptr + m * SIZE2
    scratch_xq = scratch_ptr + m * 4 * BT * FP
    scratch_f, scratch_du = scratch_xq + BT * FP, scratch_xq + 2 * BT * FP
    scratch_dz1 = scratch_xq + 3 * BT * FP

    for step in range(0, stop_chunk - first_chunk):
        chunk = stop_chunk - 1 - step
        n = chunk // CHUNKS
        batch_row = chunk % CHUNKS * BT + rows
        t = n * MINI_BATCH + batch_row - position
        is_token = (batch_row < MINI_BATCH) & (t >= 0) & (t < num_tokens)
        closes = (chunk % CHUNKS == CHUNKS - 1) & ((n + 1) * MINI_BATCH <= position + num_tokens)
        is_first_of_call = chunk == position // BT
        has_open = is_first_of_call | (chunk % CHUNKS > 0)

        n_here, local = n - first_chunk // CHUNKS, chunk - first_chunk
        w_slot = m * w_slots + n_here - 1
        w1, w2 = w1_slots_ptr + w_slot * SIZE1, w2_slots_ptr + w_slot * SIZE2
        if n_here == 0:
            w1, w2 = w1_in_ptr + m * SIZE1, w2_in_ptr + m * SIZE2
        g_slot = m * g_slots + local - 1
        g1, g2 = g1_slots_ptr + g_slot * SIZE1, g2_slots_ptr + g_slot * SIZE2
        if is_first_of_call:
            g1, g2 = g1_in_ptr + m * SIZE1, g2_in_ptr + m * SIZE2
        d1, d2, d_factor = dg1, dg2, 1.0
        if closes:
            d1, d2, d_factor = dw1, dw2, -s_last
        tl.debug_barrier()  # the later chunk's writes are done

        index = (batch * num_tokens + t) * num_heads + head
        offset = index[:, None] * K + columns[None, :]
        mask = is_token[:, None] & is_value
        q = tl.load(q_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        lr = tl.load(lr_ptr + index, mask=is_token, other=0.0).to(tl.float32)[:, None]
        s = tl.load(scale_ptr + batch_row, mask=is_token, other=0.0).to(tl.float32)[:, None]
        saved = m * (stop_chunk - first_chunk) + local
        wide = saved * BT * KP + rows[:, None] * KP + columns[None, :]
        a2 = tl.load(a2_ptr + saved * BT * BT + rows[:, None] * BT + rows[None, :])

        # the output's LayerNorm, then what lies behind the hidden width
        xq2, rstd_q = normalise(tl.load(zq2_ptr + wide), is_value, eps, K)
        d_ln_weight += tl.sum(dy * xq2, 0)
        d_ln_bias += tl.sum(dy, 0)
        e = tl.where(mask, normalise_backward(dy * ln_weight, xq2, rstd_q, is_value, K), 0.0)
        es = e * s
        x, rstd = normalise(tl.load(z2_ptr + wide), is_value, eps, K)
        target = ln_bias - v + k
        outer = lr * ln_weight * (ln_weight * x + target)
        h2 = tl.where(mask, normalise_backward(outer, x, rstd, is_value, K), 0.0)
        a1 = tl.where(is_causal, tl.dot(q, tl.trans(k), input_precision=PRECISION) + 1.0, 0.0)
        eh2 = tl.dot(e, tl.trans(h2), input_precision=PRECISION)
        da2 = tl.where(is_causal, -s * eh2, 0.0)
        ds = -tl.sum(a2 * eh2, 1)
        d_bias2 = tl.load(d2 + F * K + columns, mask=is_column, other=0.0)
        x2d2 = tl.zeros((BT, KP), tl.float32) + d_bias2[None, :]  # X2~ D2
        dh2 = -tl.dot(tl.trans(a2), es, input_precision=PRECISION)
        dq = dy
        dk = tl.zeros((BT, KP), tl.float32)
        fh1 = tl.zeros((BT, BT), tl.float32)
        ds_last = tl.zeros((BT,), tl.float32)  # <D, k~' h1> a row
        ds_open = 0.0  # <D, G>
        if has_open:
            open2_b = tl.load(g2 + F * K + columns, mask=is_column, other=0.0)
            ds -= tl.sum(e * open2_b[None, :], 1)
            ds_open = tl.sum(d_bias2 * open2_b, 0)
        for start in range(0, F, FB):
            weight1, bias1, weight2 = load_block(w1, w2, start, K, F, KP, FB)
            z1 = tl.dot(k, weight1, input_precision=PRECISION) + bias1[None, :]
            x2, slope, bend = gelu_derivatives(z1)
            u = tl.dot(h2, tl.trans(weight2), input_precision=PRECISION)
            h1 = u * slope
            zq1 = tl.dot(q, weight1, input_precision=PRECISION) + bias1[None, :]
            zq1 -= s * tl.dot(a1, h1, input_precision=PRECISION)
            dxq = tl.dot(e, tl.trans(weight2), input_precision=PRECISION)
            dxq = tl.dot(da2, x2, dxq, input_precision=PRECISION)
            if has_open:
                open1, open_b, open2 = load_block(g1, g2, start, K, F, KP, FB)
                qg1 = tl.dot(q, open1, input_precision=PRECISION) + open_b[None, :]
                zq1 -= s * qg1
                dxq -= tl.dot(es, tl.trans(open2), input_precision=PRECISION)
                xq, slope_q, _ = gelu_derivatives(zq1)
                f = dxq * slope_q
                ds -= tl.sum(f * qg1, 1)
                ds -= tl.sum(e * tl.dot(xq, open2, input_precision=PRECISION), 1)
                dq -= tl.dot(f * s, tl.trans(open1), input_precision=PRECISION)
            xq, slope_q, _ = gelu_derivatives(zq1)
            f = dxq * slope_q
            dq = tl.dot(f, tl.trans(weight1), dq, input_precision=PRECISION)
            fh1 = tl.dot(f, tl.trans(h1), fh1, input_precision=PRECISION)

            # G + P, through which the chunk reaches what comes after it
            block1, block_b, block2 = load_block(d1, d2, start, K, F, KP, FB)
            kd1 = tl.dot(k, block1, input_precision=PRECISION) + block_b[None, :]
            ds_last += tl.sum(kd1 * h1, 1)
            g = d_factor * kd1 - tl.dot(tl.trans(a1), f * s, input_precision=PRECISION)
            x2d2 = tl.dot(x2, block2, x2d2, input_precision=PRECISION)
            dk += d_factor * tl.dot(h1, tl.trans(block1), input_precision=PRECISION)
            dx2 = d_factor * tl.dot(h2, tl.trans(block2), input_precision=PRECISION)
            dx2 = tl.dot(tl.trans(da2), xq, dx2, input_precision=PRECISION)
            du = g * slope
            dh2 = tl.dot(du, weight2, dh2, input_precision=PRECISION)

            hidden = rows[:, None] * FP + (start + tl.arange(0, FB))[None, :]
            tl.store(scratch_xq + hidden, xq)
            tl.store(scratch_f + hidden, f)
            tl.store(scratch_du + hidden, du)
            tl.store(scratch_dz1 + hidden, dx2 * slope + g * u * bend)  # but for d Z2's part
            if has_open:
                open1, open_b, open2 = load_block(g1, g2, start, K, F, KP, FB)
                ds_open += tl.sum(tl.sum(block1 * open1, 1), 0) + tl.sum(tl.sum(block2 * open2, 1), 0)
                ds_open += tl.sum(block_b * open_b, 0)
                block1 = d_factor * block1 - tl.dot(tl.trans(q), f * s, input_precision=PRECISION)
                block_b = d_factor * block_b - tl.sum(f * s, 0)
                block2 = d_factor * block2 - tl.dot(tl.trans(xq), es, input_precision=PRECISION)
                tl.debug_barrier()  # the block is read
                store_block(dg1, dg2, block1, block_b, block2, start, K, F, KP, FB)
        ds_last += tl.sum(x2d2 * h2, 1)
        dh2 += d_factor * x2d2
        ds -= tl.sum(a1 * fh1, 1)
        if closes:
            is_last = batch_row == MINI_BATCH - 1
            ds -= tl.where(is_last, tl.sum(ds_last, 0) + ds_open, 0.0)

        # h2 = r P(outer), outer = offset + slope x; as LossGradientBackward of archs.ops.ttt_linear.plain
        d_outer = normalise_backward(dh2, x, rstd, is_value, K)
        d_x = lr * ln_weight * ln_weight * d_outer - (tl.sum(outer * x, 1) / K * rstd)[:, None] * dh2
        d_x -= outer * (rstd * tl.sum(dh2 * x, 1) / K)[:, None]
        dz2 = normalise_backward(d_x, x, rstd, is_value, K)
        dz2 -= x * (rstd * tl.sum(dh2 * h2, 1) / K)[:, None]
        dz2 = tl.where(mask, dz2, 0.0)
        d_target = lr * ln_weight * d_outer
        d_ln_bias += tl.sum(d_target, 0)
        d_ln_weight += tl.sum(lr * d_outer * (target + 2 * ln_weight * x), 0)
        dlr = tl.sum(ln_weight * d_outer * (target + ln_weight * x), 1)

        tl.debug_barrier()  # the scratch is written
        for start in range(0, F, FB):
            hidden = rows[:, None] * FP + (start + tl.arange(0, FB))[None, :]
            weight1, bias1, weight2 = load_block(w1, w2, start, K, F, KP, FB)
            z1 = tl.dot(k, weight1, input_precision=PRECISION) + bias1[None, :]
            x2, slope, _ = gelu_derivatives(z1)
            dz1 = tl.dot(dz2, tl.trans(weight2), input_precision=PRECISION) * slope
            dz1 += tl.load(scratch_dz1 + hidden)
            dk = tl.dot(dz1, tl.trans(weight1), dk, input_precision=PRECISION)
            f = tl.load(scratch_f + hidden)
            block1, block_b, block2 = load_block(dw1, dw2, start, K, F, KP, FB)
            block1 = tl.dot(tl.trans(k), dz1, block1, input_precision=PRECISION)
            block1 = tl.dot(tl.trans(q), f, block1, input_precision=PRECISION)
            block_b += tl.sum(dz1, 0) + tl.sum(f, 0)
            xq, du = tl.load(scratch_xq + hidden), tl.load(scratch_du + hidden)
            block2 = tl.dot(tl.trans(x2), dz2, block2, input_precision=PRECISION)
            block2 = tl.dot(tl.trans(xq), e, block2, input_precision=PRECISION)
            block2 = tl.dot(tl.trans(du), h2, block2, input_precision=PRECISION)
            tl.debug_barrier()  # the block is read
            store_block(dw1, dw2, block1, block_b, block2, start, K, F, KP, FB)

        da1 = tl.where(is_causal, -s * fh1, 0.0)
        dq = tl.dot(da1, k, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(da1), q, dk, input_precision=PRECISION) + d_target
        dw_bias2 = tl.load(dw2 + F * K + columns, mask=is_column, other=0.0)
        tl.debug_barrier()  # the biases are read
        if has_open:
            tl.store(dg2 + F * K + columns, d_factor * d_bias2 - tl.sum(es, 0), mask=is_column)
        tl.store(dw2 + F * K + columns, dw_bias2 + tl.sum(e, 0) + tl.sum(dz2, 0), mask=is_column)
        tl.store(dq_ptr + offset, dq.to(dq_ptr.dtype.element_ty), mask=mask)
        tl.store(dk_ptr + offset, dk.to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + offset, (-d_target).to(dv_ptr.dtype.element_ty), mask=mask)
        tl.store(dlr_ptr + index, dlr.to(dlr_ptr.dtype.element_ty), mask=is_token)
        tl.store(ds_ptr + index, ds, mask=is_token)

    tl.store(d_ln_weight_ptr + m * K + columns, d_ln_weight, mask=is_column)
    tl.store(d_ln_bias_ptr + m * K + columns, d_ln_bias, mask=is_column)
