"""TTT-Linear in Triton: the dual form (arXiv 2407.04620, section 2.5 and appendix A), forward, backward and
the decoding of one token, each a single launch with one program for a row of the batch and a head.

A program walks the sequence in blocks of 16 rows, of which a mini-batch has one or more, with W, its bias
and one block on chip. The serial chain of a block is z = k W, the LayerNorm's gradient h and, at the end of
a mini-batch, W -= scale_last k' h. Mini-batches of several blocks, and a call that begins inside one, hold
the open gradient G beside W; rows that lie before the call, after it or past the mini-batch are masked.

Training stores W once in `checkpoint_mini_batches`. The backward pass walks these groups from the last to
the first: it computes what each block of the group starts from again, into a scratch of one group a
program, and goes back through the group with the gradient of W (and of G, where there is one) on chip.

These kernels are tested in Triton's interpreter and compile for sm_90; no card has run them yet.

Glossary, beside that of `plain`:

    q, k, v, y     (B, T, H, K); lr (B, T, H); token_scale (b,), at row i scale_i
    W, bias        weight and bias before the mini-batch; G, g the open gradient of each
    A              tril(q k' + 1), the 1 for the bias
    u              (G + what the mini-batch adds to it) as each row reads it: q G + g + A h
    x, rstd        normalised z and 1 / its standard deviation
    dX             gradient of X; dW that of the weights after the mini-batch, then of those before it
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops.operation import ImplementationUnavailable
from archs.ops.ttt_linear import TTTLinearWeights

MAX_HEAD_WIDTH = 128  # W of one head in registers
BLOCK_TOKENS = 16  # the least rows that a product takes


def checkpoint_mini_batches(mini_batch_tokens: int) -> int:
    """Mini-batches between two stored weights: about 256 tokens, so that at head width 64 the weights take
    a quarter of the memory of q in float32."""
    return max(1, min(16, 256 // mini_batch_tokens))


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision="ieee")


@triton.jit
def _add_dot(c, a, b, OPERAND: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), c, input_precision="ieee")


@triton.jit
def _normalise(z, is_column, norm_eps, K: tl.constexpr):
    """x and rstd of the rows of z, which is 0 outside the K columns; so is x."""
    mean = tl.sum(z, axis=1) / K
    centred = tl.where(is_column[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / K + norm_eps)
    return centred * rstd[:, None], rstd[:, None]


@triton.jit
def _project(a, x, rstd, is_column, K: tl.constexpr):
    """rstd (a - mean(a) - x mean(a x)): the normalisation's gradient for the gradient a of x."""
    mean = tl.sum(a, axis=1) / K
    slope = tl.sum(a * x, axis=1) / K
    return tl.where(is_column[None, :], (a - mean[:, None] - x * slope[:, None]) * rstd, 0.0)


@triton.jit
def _inner_gradient(z, k, v, lr, ln_weight, ln_bias, is_row, is_column, norm_eps, K: tl.constexpr):
    """h = lr dl/dz, and what its derivative needs: x, rstd and the inner model's error."""
    x, rstd = _normalise(z, is_column, norm_eps, K)
    error = ln_weight[None, :] * x + ln_bias[None, :] + k - v
    h = _project(lr[:, None] * ln_weight[None, :] * error, x, rstd, is_column, K)
    return tl.where(is_row[:, None], h, 0.0), x, rstd, error


@triton.jit
def _load_state(pointer, column, is_column, K: tl.constexpr):
    """A matrix (K, K) and the row after it, 0 outside the K columns."""
    square = column[:, None] * K + column[None, :]
    matrix = tl.load(pointer + square, mask=is_column[:, None] & is_column[None, :], other=0.0)
    return matrix, tl.load(pointer + K * K + column, mask=is_column, other=0.0)


@triton.jit
def _store_state(pointer, matrix, row, column, is_column, K: tl.constexpr):
    """The inverse of `_load_state`."""
    square = column[:, None] * K + column[None, :]
    tl.store(pointer + square, matrix, mask=is_column[:, None] & is_column[None, :])
    tl.store(pointer + K * K + column, row, mask=is_column)


@triton.jit(do_not_specialize=["num_tokens", "position", "num_blocks"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, lr_ptr, scale_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, gradient_ptr,
    y_ptr, weight_out_ptr, gradient_out_ptr, checkpoint_ptr,
    num_tokens, position, num_blocks, num_heads, norm_eps,
    K: tl.constexpr, MINI_BATCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    CHECKPOINT: tl.constexpr, HAS_GRADIENT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """CHECKPOINT: mini-batches between stored weights, 0 to store none. HAS_GRADIENT: blocks read G and g."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // num_heads, program % num_heads
    i, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    is_column = column < K
    causal = i[:, None] >= i[None, :]
    ln_weight = tl.load(ln_weight_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    scale_last = tl.load(scale_ptr + MINI_BATCH - 1).to(tl.float32)
    state, end = program * (K + 1) * K, position + num_tokens
    NUM_PARTS: tl.constexpr = (MINI_BATCH + BLOCK_T - 1) // BLOCK_T  # blocks of a mini-batch
    weight, bias = _load_state(weight_ptr + state, column, is_column, K)
    if HAS_GRADIENT:
        gradient, gradient_bias = _load_state(gradient_ptr + state, column, is_column, K)

    for j in range(num_blocks):
        n, part = j // NUM_PARTS, j % NUM_PARTS
        if CHECKPOINT > 0:  # noqa: SIM102 - decided when the kernel is compiled
            if (part == 0) & (n % CHECKPOINT == 0):
                num_checkpoints = tl.cdiv(end, MINI_BATCH * CHECKPOINT)
                at = (program * num_checkpoints + n // CHECKPOINT) * (K + 1) * K
                _store_state(checkpoint_ptr + at, weight, bias, column, is_column, K)
        in_mini_batch = part * BLOCK_T + i
        t = n * MINI_BATCH + in_mini_batch - position
        is_row = (in_mini_batch < MINI_BATCH) & (t >= 0) & (t < num_tokens)
        row = (batch * num_tokens + t) * num_heads + head
        place, is_place = row[:, None] * K + column[None, :], is_row[:, None] & is_column[None, :]
        q = tl.load(q_ptr + place, mask=is_place, other=0.0)
        k = tl.load(k_ptr + place, mask=is_place, other=0.0)
        v = tl.load(v_ptr + place, mask=is_place, other=0.0)
        lr = tl.load(lr_ptr + row, mask=is_row, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + in_mini_batch, mask=is_row, other=0.0).to(tl.float32)
        is_end = (part == NUM_PARTS - 1) & ((n + 1) * MINI_BATCH <= end)

        z = _dot(k, weight, OPERAND) + bias[None, :]
        h, _, _, _ = _inner_gradient(
            z, k.to(tl.float32), v.to(tl.float32), lr, ln_weight, ln_bias, is_row, is_column, norm_eps, K
        )
        attention = tl.where(causal, _dot(q, tl.trans(k), OPERAND) + 1.0, 0.0)
        u = _dot(attention, h, OPERAND)
        if HAS_GRADIENT:
            u += _dot(q, gradient, OPERAND) + gradient_bias[None, :]
        z = _dot(q, weight, OPERAND) + bias[None, :] - scale[:, None] * u
        x, _ = _normalise(z, is_column, norm_eps, K)
        y = q.to(tl.float32) + ln_weight[None, :] * x + ln_bias[None, :]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=is_place)

        step = tl.where(is_end, scale_last, 0.0)  # W changes at the end of a mini-batch alone
        if HAS_GRADIENT:
            gradient = _add_dot(gradient, tl.trans(k), h, OPERAND)
            gradient_bias += tl.sum(h, axis=0)
            weight -= step * gradient
            bias -= step * gradient_bias
            gradient = tl.where(is_end, 0.0, gradient)
            gradient_bias = tl.where(is_end, 0.0, gradient_bias)
        else:
            weight = _add_dot(weight, tl.trans(k), -step * h, OPERAND)
            bias -= step * tl.sum(h, axis=0)
            if (n + 1) * MINI_BATCH > end:  # the last one stays open
                gradient_out = _dot(tl.trans(k), h, OPERAND)
                _store_state(gradient_out_ptr + state, gradient_out, tl.sum(h, axis=0), column, is_column, K)

    _store_state(weight_out_ptr + state, weight, bias, column, is_column, K)
    if HAS_GRADIENT:
        _store_state(gradient_out_ptr + state, gradient, gradient_bias, column, is_column, K)
    elif end % MINI_BATCH == 0:
        none = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
        _store_state(gradient_out_ptr + state, none, tl.sum(none, axis=0), column, is_column, K)


@triton.jit(do_not_specialize=["num_tokens", "position", "num_blocks"])
def _backward_kernel(
    q_ptr, k_ptr, v_ptr, lr_ptr, scale_ptr, ln_weight_ptr, ln_bias_ptr, gradient_ptr, checkpoint_ptr,
    dy_ptr, dweight_out_ptr, dgradient_out_ptr,
    dq_ptr, dk_ptr, dv_ptr, dlr_ptr, dscale_ptr, dln_weight_ptr, dln_bias_ptr, dweight_ptr, dgradient_ptr,
    scratch_weight_ptr, scratch_bias_ptr, scratch_gradient_ptr, scratch_gradient_bias_ptr,
    num_tokens, position, num_blocks, num_heads, norm_eps,
    K: tl.constexpr, MINI_BATCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    CHECKPOINT: tl.constexpr, HAS_GRADIENT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """dscale (B, T, H) is each token's part and dln (B H, K) each program's. scratch, with a leading axis of
    programs: weight (CHECKPOINT, K, K) and gradient (CHECKPOINT * blocks of a mini-batch, K, K) as the
    products take them, and their biases."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // num_heads, program % num_heads
    i, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    is_column = column < K
    causal, anticausal = i[:, None] >= i[None, :], i[:, None] <= i[None, :]
    square, square_t = column[:, None] * K + column[None, :], column[None, :] * K + column[:, None]
    is_square = is_column[:, None] & is_column[None, :]
    ln_weight = tl.load(ln_weight_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    scale_last = tl.load(scale_ptr + MINI_BATCH - 1).to(tl.float32)
    state, end = program * (K + 1) * K, position + num_tokens
    NUM_PARTS: tl.constexpr = (MINI_BATCH + BLOCK_T - 1) // BLOCK_T  # blocks of a mini-batch
    num_checkpoints = tl.cdiv(end, MINI_BATCH * CHECKPOINT)
    dln_weight = tl.zeros((BLOCK_K,), tl.float32)
    dln_bias = tl.zeros((BLOCK_K,), tl.float32)
    if HAS_GRADIENT:
        dweight, dbias = _load_state(dweight_out_ptr + state, column, is_column, K)
        dgradient, dgradient_bias = _load_state(dgradient_out_ptr + state, column, is_column, K)
    else:
        # Without dG on chip: an open last mini-batch hands on k' h where a whole one hands on W -
        # scale_last k' h. With dG in the place of dW it is a whole one of scale -1; then dW takes over.
        if end % MINI_BATCH == 0:
            dweight, dbias = _load_state(dweight_out_ptr + state, column, is_column, K)
        else:
            dweight, dbias = _load_state(dgradient_out_ptr + state, column, is_column, K)

    for group in range(num_checkpoints):
        first = (num_checkpoints - 1 - group) * CHECKPOINT
        first_block = first * NUM_PARTS
        last_block = tl.minimum(first_block + CHECKPOINT * NUM_PARTS, num_blocks) - 1
        at = (program * num_checkpoints + first // CHECKPOINT) * (K + 1) * K
        weight, bias = _load_state(checkpoint_ptr + at, column, is_column, K)
        if HAS_GRADIENT:
            gradient, gradient_bias = _load_state(gradient_ptr + state, column, is_column, K)
            gradient = tl.where(first == 0, gradient, 0.0)
            gradient_bias = tl.where(first == 0, gradient_bias, 0.0)
        for j in range(first_block, last_block + 1):
            n, part = j // NUM_PARTS, j % NUM_PARTS
            slot = program * CHECKPOINT + n - first
            tl.store(scratch_weight_ptr + slot * K * K + square, weight.to(OPERAND), mask=is_square)
            tl.store(scratch_bias_ptr + slot * K + column, bias, mask=is_column)
            in_mini_batch = part * BLOCK_T + i
            t = n * MINI_BATCH + in_mini_batch - position
            is_row = (in_mini_batch < MINI_BATCH) & (t >= 0) & (t < num_tokens)
            row = (batch * num_tokens + t) * num_heads + head
            place, is_place = row[:, None] * K + column[None, :], is_row[:, None] & is_column[None, :]
            k = tl.load(k_ptr + place, mask=is_place, other=0.0)
            v = tl.load(v_ptr + place, mask=is_place, other=0.0)
            lr = tl.load(lr_ptr + row, mask=is_row, other=0.0).to(tl.float32)
            z = _dot(k, weight, OPERAND) + bias[None, :]
            h, _, _, _ = _inner_gradient(
                z, k.to(tl.float32), v.to(tl.float32), lr, ln_weight, ln_bias, is_row, is_column, norm_eps, K
            )
            if HAS_GRADIENT:
                slot = program * CHECKPOINT * NUM_PARTS + j - first_block
                tl.store(scratch_gradient_ptr + slot * K * K + square, gradient.to(OPERAND), mask=is_square)
                tl.store(scratch_gradient_bias_ptr + slot * K + column, gradient_bias, mask=is_column)
                is_end = part == NUM_PARTS - 1
                step = tl.where(is_end, scale_last, 0.0)
                gradient = _add_dot(gradient, tl.trans(k), h, OPERAND)
                gradient_bias += tl.sum(h, axis=0)
                weight -= step * gradient
                bias -= step * gradient_bias
                gradient = tl.where(is_end, 0.0, gradient)
                gradient_bias = tl.where(is_end, 0.0, gradient_bias)
            else:
                weight = _add_dot(weight, tl.trans(k), -scale_last * h, OPERAND)
                bias -= scale_last * tl.sum(h, axis=0)
        tl.debug_barrier()  # the scratch is read by other threads than wrote it

        for back in range(last_block + 1 - first_block):
            j = last_block - back
            n, part = j // NUM_PARTS, j % NUM_PARTS
            slot = program * CHECKPOINT + n - first
            weight_n = tl.load(scratch_weight_ptr + slot * K * K + square, mask=is_square, other=0.0)
            bias_n = tl.load(scratch_bias_ptr + slot * K + column, mask=is_column, other=0.0)
            in_mini_batch = part * BLOCK_T + i
            t = n * MINI_BATCH + in_mini_batch - position
            is_row = (in_mini_batch < MINI_BATCH) & (t >= 0) & (t < num_tokens)
            row = (batch * num_tokens + t) * num_heads + head
            place, is_place = row[:, None] * K + column[None, :], is_row[:, None] & is_column[None, :]
            q = tl.load(q_ptr + place, mask=is_place, other=0.0)
            k = tl.load(k_ptr + place, mask=is_place, other=0.0)
            v = tl.load(v_ptr + place, mask=is_place, other=0.0)
            dy = tl.load(dy_ptr + place, mask=is_place, other=0.0).to(tl.float32)
            lr = tl.load(lr_ptr + row, mask=is_row, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + in_mini_batch, mask=is_row, other=0.0).to(tl.float32)
            is_whole = (n + 1) * MINI_BATCH <= end
            is_end = (part == NUM_PARTS - 1) & is_whole

            # dhanded and its factor: the gradient of G + k' h as the block hands it on.
            if HAS_GRADIENT:
                dgradient = tl.where(is_end, -scale_last * dweight, dgradient)
                dgradient_bias = tl.where(is_end, -scale_last * dbias, dgradient_bias)
                dhanded, dhanded_bias, factor = dgradient, dgradient_bias, 1.0
            else:
                dhanded, dhanded_bias, factor = dweight, dbias, tl.where(is_whole, -scale_last, 1.0)

            # The forward pass again. Products with the same left operand follow one another, and those
            # with W' wait, so that few operands are in registers at a time. A' is a product of its own:
            # Triton has got the transpose of a product wrong on Hopper where it is a left operand.
            k_dhanded = _dot(k, dhanded, OPERAND) + dhanded_bias[None, :]
            attention_t = tl.where(anticausal, _dot(k, tl.trans(q), OPERAND) + 1.0, 0.0)
            z = _dot(k, weight_n, OPERAND) + bias_n[None, :]
            z_q = _dot(q, weight_n, OPERAND) + bias_n[None, :]
            attention = tl.where(causal, _dot(q, tl.trans(k), OPERAND) + 1.0, 0.0)
            h, x, rstd, error = _inner_gradient(
                z, k.to(tl.float32), v.to(tl.float32), lr, ln_weight, ln_bias, is_row, is_column, norm_eps, K
            )
            u = _dot(attention, h, OPERAND)
            if HAS_GRADIENT:
                slot_g = program * CHECKPOINT * NUM_PARTS + j - first_block
                gradient_j = tl.load(
                    scratch_gradient_ptr + slot_g * K * K + square, mask=is_square, other=0.0
                )
                bias_j = tl.load(scratch_gradient_bias_ptr + slot_g * K + column, mask=is_column, other=0.0)
                u += _dot(q, gradient_j, OPERAND) + bias_j[None, :]
                k_dweight = _dot(k, dweight, OPERAND) + dbias[None, :]
                dscale_last = tl.sum(k_dweight * h) + tl.sum(dbias * bias_j)
                dscale_last += tl.sum(dweight * gradient_j.to(tl.float32))
            else:
                dscale_last = tl.sum(k_dhanded * h)
            dscale_last = tl.where(is_end, dscale_last, 0.0)

            # Through the output's normalisation.
            x_q, rstd_q = _normalise(z_q - scale[:, None] * u, is_column, norm_eps, K)
            dln_weight += tl.sum(dy * x_q, axis=0)
            dln_bias += tl.sum(dy, axis=0)
            dz_q = _project(dy * ln_weight[None, :], x_q, rstd_q, is_column, K)
            dz_q = tl.where(is_row[:, None], dz_q, 0.0)
            dscale = -tl.sum(dz_q * u, axis=1) - tl.where(in_mini_batch == MINI_BATCH - 1, dscale_last, 0.0)
            du = -scale[:, None] * dz_q

            # Through u and G + k' h.
            dh = _dot(attention_t, du, OPERAND) + factor * k_dhanded
            dattention = tl.where(causal, _dot(du, tl.trans(h), OPERAND), 0.0)
            dq = dy + _dot(dattention, k, OPERAND)
            dattention_t = tl.where(anticausal, _dot(h, tl.trans(du), OPERAND), 0.0)
            dk = _dot(dattention_t, q, OPERAND) + factor * _dot(h, tl.trans(dhanded), OPERAND)
            if HAS_GRADIENT:
                gradient_t = tl.load(
                    scratch_gradient_ptr + slot_g * K * K + square_t, mask=is_square, other=0.0
                )
                dq += _dot(du, gradient_t, OPERAND)

            # Through h = rstd P(outer), outer = lr ln_weight error: plain's LossGradientBackward.
            dh = tl.where(is_row[:, None], dh, 0.0)
            douter = _project(dh, x, rstd, is_column, K)
            derror = douter * lr[:, None] * ln_weight[None, :]
            dln_weight += tl.sum(douter * lr[:, None] * (error + ln_weight[None, :] * x), axis=0)
            dln_bias += tl.sum(derror, axis=0)
            dlr = tl.sum(douter * ln_weight[None, :] * error, axis=1)
            outer = lr[:, None] * ln_weight[None, :] * error
            mean_outer_x = tl.sum(outer * x, axis=1)[:, None] / K
            mean_dh_x = tl.sum(dh * x, axis=1)[:, None] / K
            mean_dh_h = tl.sum(dh * h, axis=1)[:, None] / K
            dx = derror * ln_weight[None, :] - rstd * (mean_outer_x * dh + mean_dh_x * outer)
            dz = _project(dx, x, rstd, is_column, K) - rstd * mean_dh_h * x

            weight_t = tl.load(scratch_weight_ptr + slot * K * K + square_t, mask=is_square, other=0.0)
            dq += _dot(dz_q, weight_t, OPERAND)
            dk += _dot(dz, weight_t, OPERAND) + derror
            tl.store(dq_ptr + place, dq.to(dq_ptr.dtype.element_ty), mask=is_place)
            tl.store(dk_ptr + place, dk.to(dk_ptr.dtype.element_ty), mask=is_place)
            tl.store(dv_ptr + place, (-derror).to(dv_ptr.dtype.element_ty), mask=is_place)
            tl.store(dlr_ptr + row, dlr.to(dlr_ptr.dtype.element_ty), mask=is_row)
            tl.store(dscale_ptr + row, dscale, mask=is_row)

            if HAS_GRADIENT:
                dgradient = _add_dot(dgradient, tl.trans(q), du, OPERAND)
                dgradient_bias += tl.sum(du, axis=0)
            else:
                if not is_whole:
                    dweight, dbias = _load_state(dweight_out_ptr + state, column, is_column, K)
            dweight = _add_dot(dweight, tl.trans(q), dz_q, OPERAND)
            dweight = _add_dot(dweight, tl.trans(k), dz, OPERAND)
            dbias += tl.sum(dz_q + dz, axis=0)
        tl.debug_barrier()  # the next group writes the scratch again

    _store_state(dweight_ptr + state, dweight, dbias, column, is_column, K)
    if HAS_GRADIENT:
        _store_state(dgradient_ptr + state, dgradient, dgradient_bias, column, is_column, K)
    tl.store(dln_weight_ptr + program * K + column, dln_weight, mask=is_column)
    tl.store(dln_bias_ptr + program * K + column, dln_bias, mask=is_column)


@triton.jit(do_not_specialize=["position"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, lr_ptr, scale_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, gradient_ptr,
    y_ptr, weight_out_ptr, gradient_out_ptr,
    position, num_heads, norm_eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """One token; IS_LAST where it completes its mini-batch, else W stays and weight_out is not written."""
    program = tl.program_id(0).to(tl.int64)
    head = program % num_heads
    column = tl.arange(0, BLOCK_K)
    is_column = column < K
    is_row = tl.full((1,), 1, tl.int1)
    ln_weight = tl.load(ln_weight_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    q = tl.load(q_ptr + program * K + column, mask=is_column, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + program * K + column, mask=is_column, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + program * K + column, mask=is_column, other=0.0).to(tl.float32)
    lr = tl.load(lr_ptr + program).to(tl.float32)
    scale = tl.load(scale_ptr + position).to(tl.float32)
    state = program * (K + 1) * K
    weight, bias = _load_state(weight_ptr + state, column, is_column, K)
    gradient, gradient_bias = _load_state(gradient_ptr + state, column, is_column, K)

    z = tl.sum(k[:, None] * weight, axis=0) + bias
    h, _, _, _ = _inner_gradient(
        z[None, :], k[None, :], v[None, :], tl.full((1,), 1.0, tl.float32) * lr, ln_weight, ln_bias, is_row,
        is_column, norm_eps, K,
    )  # fmt: skip
    gradient += k[:, None] * h
    gradient_bias += tl.sum(h, axis=0)
    weight -= scale * gradient
    bias -= scale * gradient_bias
    z = tl.sum(q[:, None] * weight, axis=0) + bias
    x, _ = _normalise(z[None, :], is_column, norm_eps, K)
    y = q + ln_weight * tl.sum(x, axis=0) + ln_bias
    tl.store(y_ptr + program * K + column, y.to(y_ptr.dtype.element_ty), mask=is_column)
    if IS_LAST:
        _store_state(weight_out_ptr + state, weight, bias, column, is_column, K)
        gradient = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
        gradient_bias = tl.zeros((BLOCK_K,), tl.float32)
    _store_state(gradient_out_ptr + state, gradient, gradient_bias, column, is_column, K)


def _launch_options(num_columns: int, operand: torch.dtype) -> dict[str, int]:
    """Warps and stages of a kernel on blocks of 16 tokens and `num_columns`. A product in float32 is
    computed without tensor cores, from whole rows in registers: it wants more threads, which at 128
    columns then take all registers there are (ptxas would give each fewer and spill)."""
    if operand == torch.bfloat16:
        return {"num_warps": 8 if num_columns > 64 else 4, "num_stages": 1}
    if num_columns > 64:
        return {"num_warps": 16, "num_stages": 1, "maxnreg": 128}
    return {"num_warps": 8, "num_stages": 1}


def _compiled_for(q: Tensor, k: Tensor, token_scale: Tensor) -> dict[str, Any]:
    """What the kernels of a sequence are compiled for, and how they are launched."""
    operand = torch.bfloat16 if q.dtype == k.dtype == torch.bfloat16 else torch.float32
    block_columns = max(16, triton.next_power_of_2(q.shape[-1]))
    return {
        "K": q.shape[-1],
        "MINI_BATCH": token_scale.shape[0],
        "BLOCK_T": BLOCK_TOKENS,
        "BLOCK_K": block_columns,
        "OPERAND": tl.bfloat16 if operand == torch.bfloat16 else tl.float32,
        **_launch_options(block_columns, operand),
    }


def _sizes(
    q: Tensor, token_scale: Tensor, position: int, norm_eps: float
) -> tuple[int, int, int, int, float]:
    """num_tokens, position, num_blocks, num_heads and norm_eps as the kernels take them."""
    whole, rest = divmod(position + q.shape[1], token_scale.shape[0])
    num_blocks = whole * triton.cdiv(token_scale.shape[0], BLOCK_TOKENS) + triton.cdiv(rest, BLOCK_TOKENS)
    return q.shape[1], position, num_blocks, q.shape[2], norm_eps


def _forward(
    inputs: tuple[Tensor, ...], position: int, norm_eps: float, *, checkpoint: int, has_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, weight and gradient after the tokens, and the weights before every `checkpoint` mini-batches,
    (B, H, N, K + 1, K), of which there are none for 0."""
    q, k, _, _, token_scale, _, _, weight, gradient = inputs
    batch_size, num_tokens, num_heads, width = q.shape
    y, weight_after, gradient_after = (torch.empty_like(t) for t in (q, weight, gradient))
    group_tokens = token_scale.shape[0] * checkpoint
    num_checkpoints = triton.cdiv(position + num_tokens, group_tokens) if checkpoint else 0
    checkpoints = weight.new_empty(batch_size, num_heads, num_checkpoints, width + 1, width)
    _forward_kernel[(batch_size * num_heads,)](
        *inputs, y, weight_after, gradient_after, checkpoints,
        *_sizes(q, token_scale, position, norm_eps),
        CHECKPOINT=checkpoint, HAS_GRADIENT=has_gradient, **_compiled_for(q, k, token_scale),
    )  # fmt: skip
    return y, weight_after, gradient_after, checkpoints


def _decode(inputs: tuple[Tensor, ...], position: int, norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, weight and gradient after one token; the weight is the one given while its mini-batch is open."""
    q, token_scale, weight, gradient = inputs[0], inputs[4], *inputs[7:]
    batch_size, _, num_heads, width = q.shape
    is_last = position + 1 == token_scale.shape[0]
    y, gradient_after = torch.empty_like(q), torch.empty_like(gradient)
    weight_after = torch.empty_like(weight) if is_last else weight
    block_columns = max(16, triton.next_power_of_2(width))
    _decode_kernel[(batch_size * num_heads,)](
        *inputs, y, weight_after, gradient_after, position, num_heads, norm_eps,
        K=width, BLOCK_K=block_columns, IS_LAST=is_last, num_warps=8 if block_columns > 64 else 4,
    )  # fmt: skip
    return y, weight_after, gradient_after


class _TTTLinear(torch.autograd.Function):
    """q, k, v, lr, token_scale, ln_weight, ln_bias, weight and gradient, all contiguous, then position,
    norm_eps and whether the open gradient is read -> y, weight, gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, position, norm_eps, has_gradient = arguments
        ctx.position, ctx.norm_eps, ctx.has_gradient = position, norm_eps, has_gradient
        ctx.checkpoint = checkpoint_mini_batches(inputs[4].shape[0])
        y, weight, gradient, checkpoints = _forward(
            tuple(inputs), position, norm_eps, checkpoint=ctx.checkpoint, has_gradient=has_gradient
        )
        ctx.save_for_backward(*inputs[:7], inputs[8], checkpoints)  # the first checkpoint is the weight
        return y, weight, gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gradient, checkpoints = ctx.saved_tensors
        q, k, v, lr, token_scale, ln_weight, ln_bias = inputs
        batch_size, num_tokens, num_heads, width = q.shape
        num_programs, mini_batch_tokens = batch_size * num_heads, token_scale.shape[0]
        d_tokens = [torch.empty_like(t) for t in (q, k, v, lr)]
        d_scale = gradient.new_empty(batch_size, num_tokens, num_heads)
        d_ln = [gradient.new_empty(batch_size, num_heads, width) for _ in range(2)]
        d_state = [torch.empty_like(gradient) for _ in range(2)]
        compiled_for = _compiled_for(q, k, token_scale)
        operand = torch.bfloat16 if compiled_for["OPERAND"] == tl.bfloat16 else torch.float32
        num_slots = num_programs * ctx.checkpoint
        scratch = [
            gradient.new_empty(num_slots, width, width, dtype=operand),
            gradient.new_empty(num_slots, width),
        ]
        num_slots *= triton.cdiv(mini_batch_tokens, BLOCK_TOKENS) if ctx.has_gradient else 0
        scratch += [
            gradient.new_empty(num_slots, width, width, dtype=operand),
            gradient.new_empty(num_slots, width),
        ]
        _backward_kernel[(num_programs,)](
            *inputs, gradient, checkpoints, *(d.contiguous() for d in d_outputs),
            *d_tokens, d_scale, *d_ln, *d_state, *scratch,
            *_sizes(q, token_scale, ctx.position, ctx.norm_eps),
            CHECKPOINT=ctx.checkpoint, HAS_GRADIENT=ctx.has_gradient, **compiled_for,
        )  # fmt: skip
        absent = (ctx.position, -(ctx.position + num_tokens) % mini_batch_tokens)
        d_scale = F.pad(d_scale.sum((0, 2)), absent).view(-1, mini_batch_tokens).sum(0).to(token_scale.dtype)
        d_ln_weight, d_ln_bias = d_ln[0].sum(0).to(ln_weight.dtype), d_ln[1].sum(0).to(ln_bias.dtype)
        d_gradient = d_state[1] if ctx.has_gradient else None
        return *d_tokens, d_scale, d_ln_weight, d_ln_bias, d_state[0], d_gradient, None, None, None


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: TTTLinearWeights,
    position: int,
    *,
    norm_eps: float,
) -> tuple[Tensor, TTTLinearWeights]:
    """See archs.ops.ttt_linear.ttt_linear; the inputs in any floating dtype, the state in float32. Where q
    and k are bfloat16, so are the operands of the products; their sums and everything else are float32.

    Raises ImplementationUnavailable for a state in another dtype and for K > 128."""
    if state.weight.dtype != torch.float32:
        raise ImplementationUnavailable(
            f"implementation 'triton' of ttt_linear computes in float32, not {state.weight.dtype}; "
            "choose another implementation."
        )
    if q.shape[-1] > MAX_HEAD_WIDTH:
        raise ImplementationUnavailable(
            f"implementation 'triton' of ttt_linear has room on chip for head width {MAX_HEAD_WIDTH}, "
            f"not {q.shape[-1]}; choose another implementation."
        )
    inputs = tuple(t.contiguous() for t in (q, k, v, lr, token_scale, ln_weight, ln_bias, *state))
    is_differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    # A mini-batch of one block that opens with the call has no gradient yet.
    has_gradient = position > 0 or token_scale.shape[0] > BLOCK_TOKENS
    if is_differentiated:
        has_gradient = has_gradient or state.gradient.requires_grad
        y, weight, gradient = _TTTLinear.apply(*inputs, position, norm_eps, has_gradient)
    elif q.shape[1] == 1:
        y, weight, gradient = _decode(inputs, position, norm_eps)
    else:
        y, weight, gradient, _ = _forward(inputs, position, norm_eps, checkpoint=0, has_gradient=has_gradient)
    return y, TTTLinearWeights(weight, gradient)
