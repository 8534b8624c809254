"""TTT-Linear in Triton: the dual form (arXiv 2407.04620, section 2.5 and appendix A), forward, backward and
the decoding of one token, each a single launch with one program for a row of the batch and a head.

A program walks the mini-batches in order; the serial chain of one is z = k W, the LayerNorm's gradient h and
W -= scale_last k' h. It keeps W, its bias and one mini-batch's rows on chip. The open mini-batch that a
call may find is its first mini-batch with the rows before `position` masked and its gradient state G
added, and the one that it may leave is its last, with the rows after the sequence masked. Training
stores W once in `checkpoint_mini_batches`. The backward pass walks these groups from the last to the
first: it computes the weights before each mini-batch of the group again, into a scratch of one group a
program, and then goes back through the group with the gradient of W on chip and W read from the scratch.

Glossary, beside that of `plain`:

    q, k, v, y     (B, T, H, K); lr (B, T, H); token_scale (b,), at row i scale_i
    W, bias        weight and bias before the mini-batch; G, g the open gradient of each
    A              tril(q k' + 1), the 1 for the bias; AT its transpose. Both are computed, since Triton has
                   transposed a product's result wrongly on Hopper where it is a left operand.
    u              (G + what the mini-batch adds to it) as each row reads it: q G + g + A h
    x, rstd        normalised z and 1 / its standard deviation
    dX             gradient of X; dW that of the weights after the mini-batch, then of those before it
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops.operation import ImplementationUnavailable
from archs.ops.ttt_linear import TTTLinearWeights

MAX_HEAD_WIDTH = 128  # W of one head in registers
MAX_MINI_BATCH_TOKENS = 64  # the rows of one mini-batch beside it


def checkpoint_mini_batches(mini_batch_tokens: int) -> int:
    """Mini-batches between two stored weights: about 256 tokens, so that at head width 64 the weights take
    a quarter of the memory of q in float32."""
    return max(1, min(16, 256 // mini_batch_tokens))


def launch_options(block_tokens: int, block_width: int) -> dict[str, int]:
    """Warps and stages of every kernel here, for blocks of tokens and head width."""
    return {"num_warps": 8 if max(block_tokens * 2, block_width) >= 128 else 4, "num_stages": 1}


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision="ieee")


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
def _inner_gradient(
    z, k, v, lr, ln_weight, ln_bias, is_row, is_column, norm_eps, K: tl.constexpr
):
    """h = lr dl/dz, and what its derivative needs: x, rstd and the inner model's error."""
    x, rstd = _normalise(z, is_column, norm_eps, K)
    error = ln_weight[None, :] * x + ln_bias[None, :] + k - v
    h = _project(lr[:, None] * ln_weight[None, :] * error, x, rstd, is_column, K)
    return tl.where(is_row[:, None], h, 0.0), x, rstd, error


@triton.jit(do_not_specialize=["num_tokens", "position", "num_mini_batches"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, lr_ptr, scale_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, gradient_ptr,
    y_ptr, weight_out_ptr, gradient_out_ptr, checkpoint_ptr,
    num_tokens, position, num_mini_batches, num_heads, norm_eps,
    K: tl.constexpr, MINI_BATCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    CHECKPOINT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """CHECKPOINT: mini-batches between stored weights, 0 to store none."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // num_heads, program % num_heads
    i, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    is_column = column < K
    causal = i[:, None] >= i[None, :]
    square = column[:, None] * K + column[None, :]
    is_square = is_column[:, None] & is_column[None, :]
    ln_weight = tl.load(ln_weight_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + i, mask=i < MINI_BATCH, other=0.0).to(tl.float32)
    scale_last = tl.load(scale_ptr + MINI_BATCH - 1).to(tl.float32)
    state = program * (K + 1) * K
    weight = tl.load(weight_ptr + state + square, mask=is_square, other=0.0)
    bias = tl.load(weight_ptr + state + K * K + column, mask=is_column, other=0.0)
    end = position + num_tokens

    for n in range(num_mini_batches):
        if CHECKPOINT > 0:
            if n % CHECKPOINT == 0:
                num_checkpoints = tl.cdiv(num_mini_batches, CHECKPOINT)
                at = (program * num_checkpoints + n // CHECKPOINT) * (K + 1) * K
                tl.store(checkpoint_ptr + at + square, weight, mask=is_square)
                tl.store(checkpoint_ptr + at + K * K + column, bias, mask=is_column)
        t = n * MINI_BATCH + i - position
        is_row = (i < MINI_BATCH) & (t >= 0) & (t < num_tokens)
        row = (batch * num_tokens + t) * num_heads + head
        place, is_place = row[:, None] * K + column[None, :], is_row[:, None] & is_column[None, :]
        q = tl.load(q_ptr + place, mask=is_place, other=0.0)
        k = tl.load(k_ptr + place, mask=is_place, other=0.0)
        v = tl.load(v_ptr + place, mask=is_place, other=0.0)
        lr = tl.load(lr_ptr + row, mask=is_row, other=0.0).to(tl.float32)

        z = _dot(k, weight, OPERAND) + bias[None, :]
        h, _, _, _ = _inner_gradient(
            z, k.to(tl.float32), v.to(tl.float32), lr, ln_weight, ln_bias, is_row, is_column, norm_eps, K
        )
        attention = tl.where(causal, _dot(q, tl.trans(k), OPERAND) + 1.0, 0.0)
        u = _dot(attention, h, OPERAND)
        z = _dot(q, weight, OPERAND) + bias[None, :]
        step = tl.where((n + 1) * MINI_BATCH <= end, scale_last, 0.0)  # an open mini-batch leaves W
        if n == 0:
            gradient = tl.load(gradient_ptr + state + square, mask=is_square, other=0.0)
            gradient_bias = tl.load(gradient_ptr + state + K * K + column, mask=is_column, other=0.0)
            u += _dot(q, gradient, OPERAND) + gradient_bias[None, :]
            weight -= step * gradient
            bias -= step * gradient_bias
        x, _ = _normalise(z - scale[:, None] * u, is_column, norm_eps, K)
        y = q.to(tl.float32) + ln_weight[None, :] * x + ln_bias[None, :]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=is_place)

        weight += _dot(tl.trans(k), -step * h, OPERAND)
        bias -= step * tl.sum(h, axis=0)
        if (n + 1) * MINI_BATCH > end:
            gradient = _dot(tl.trans(k), h, OPERAND)
            gradient_bias = tl.sum(h, axis=0)
            if n == 0:
                gradient += tl.load(gradient_ptr + state + square, mask=is_square, other=0.0)
                gradient_bias += tl.load(gradient_ptr + state + K * K + column, mask=is_column, other=0.0)
            tl.store(gradient_out_ptr + state + square, gradient, mask=is_square)
            tl.store(gradient_out_ptr + state + K * K + column, gradient_bias, mask=is_column)

    tl.store(weight_out_ptr + state + square, weight, mask=is_square)
    tl.store(weight_out_ptr + state + K * K + column, bias, mask=is_column)
    if num_mini_batches * MINI_BATCH == end:
        none = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
        tl.store(gradient_out_ptr + state + square, none, mask=is_square)
        tl.store(gradient_out_ptr + state + K * K + column, tl.sum(none, axis=0), mask=is_column)


@triton.jit(do_not_specialize=["num_tokens", "position", "num_mini_batches"])
def _backward_kernel(
    q_ptr, k_ptr, v_ptr, lr_ptr, scale_ptr, ln_weight_ptr, ln_bias_ptr, gradient_ptr, checkpoint_ptr,
    dy_ptr, dweight_out_ptr, dhanded_ptr,
    dq_ptr, dk_ptr, dv_ptr, dlr_ptr, dscale_ptr, dln_weight_ptr, dln_bias_ptr, dweight_ptr, dgradient_ptr,
    scratch_ptr, scratch_bias_ptr,
    num_tokens, position, num_mini_batches, num_heads, norm_eps,
    K: tl.constexpr, MINI_BATCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    CHECKPOINT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """dhanded: the gradient of what the last mini-batch hands on, weights or open gradient. dscale (B H, b) and
    dln (B H, K) are each program's part. scratch (B H, CHECKPOINT, K, K) holds
    weights as the products take them, scratch_bias (B H, CHECKPOINT, K) the biases."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // num_heads, program % num_heads
    i, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    is_column = column < K
    causal, anticausal = i[:, None] >= i[None, :], i[:, None] <= i[None, :]
    square = column[:, None] * K + column[None, :]
    is_square = is_column[:, None] & is_column[None, :]
    ln_weight = tl.load(ln_weight_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + i, mask=i < MINI_BATCH, other=0.0).to(tl.float32)
    scale_last = tl.load(scale_ptr + MINI_BATCH - 1).to(tl.float32)
    state = program * (K + 1) * K
    end = position + num_tokens
    num_checkpoints = tl.cdiv(num_mini_batches, CHECKPOINT)

    # An open last mini-batch hands on G + k' h where a whole one hands on W - scale_last (G + k' h):
    # with dG in the place of dW it is a whole one of scale -1, and dW takes over once it is done.
    dweight = tl.load(dhanded_ptr + state + square, mask=is_square, other=0.0)
    dbias = tl.load(dhanded_ptr + state + K * K + column, mask=is_column, other=0.0)
    dln_weight = tl.zeros((BLOCK_K,), tl.float32)
    dln_bias = tl.zeros((BLOCK_K,), tl.float32)
    dscale = tl.zeros((BLOCK_T,), tl.float32)

    for group in range(num_checkpoints):
        first = (num_checkpoints - 1 - group) * CHECKPOINT
        last = tl.minimum(first + CHECKPOINT, num_mini_batches) - 1
        at = (program * num_checkpoints + first // CHECKPOINT) * (K + 1) * K
        weight = tl.load(checkpoint_ptr + at + square, mask=is_square, other=0.0)
        bias = tl.load(checkpoint_ptr + at + K * K + column, mask=is_column, other=0.0)
        for n in range(first, last + 1):
            slot = program * CHECKPOINT + n - first
            tl.store(scratch_ptr + slot * K * K + square, weight.to(OPERAND), mask=is_square)
            tl.store(scratch_bias_ptr + slot * K + column, bias, mask=is_column)
            t = n * MINI_BATCH + i - position
            is_row = (i < MINI_BATCH) & (t >= 0) & (t < num_tokens)
            row = (batch * num_tokens + t) * num_heads + head
            place, is_place = row[:, None] * K + column[None, :], is_row[:, None] & is_column[None, :]
            k = tl.load(k_ptr + place, mask=is_place, other=0.0)
            v = tl.load(v_ptr + place, mask=is_place, other=0.0)
            lr = tl.load(lr_ptr + row, mask=is_row, other=0.0).to(tl.float32)
            z = _dot(k, weight, OPERAND) + bias[None, :]
            h, _, _, _ = _inner_gradient(
                z, k.to(tl.float32), v.to(tl.float32), lr, ln_weight, ln_bias, is_row, is_column, norm_eps, K
            )
            if n == 0:
                gradient = tl.load(gradient_ptr + state + square, mask=is_square, other=0.0)
                gradient_bias = tl.load(gradient_ptr + state + K * K + column, mask=is_column, other=0.0)
                weight -= scale_last * gradient
                bias -= scale_last * gradient_bias
            weight += _dot(tl.trans(k), -scale_last * h, OPERAND)  # unused after the group's last
            bias -= scale_last * tl.sum(h, axis=0)
        tl.debug_barrier()  # the scratch is read by other threads than wrote it

        for back in range(last + 1 - first):
            n = last - back
            slot = program * CHECKPOINT + n - first
            weight_n = tl.load(scratch_ptr + slot * K * K + square, mask=is_square, other=0.0)
            bias_n = tl.load(scratch_bias_ptr + slot * K + column, mask=is_column, other=0.0)
            t = n * MINI_BATCH + i - position
            is_row = (i < MINI_BATCH) & (t >= 0) & (t < num_tokens)
            row = (batch * num_tokens + t) * num_heads + head
            place, is_place = row[:, None] * K + column[None, :], is_row[:, None] & is_column[None, :]
            q = tl.load(q_ptr + place, mask=is_place, other=0.0)
            k = tl.load(k_ptr + place, mask=is_place, other=0.0)
            v = tl.load(v_ptr + place, mask=is_place, other=0.0)
            dy = tl.load(dy_ptr + place, mask=is_place, other=0.0).to(tl.float32)
            lr = tl.load(lr_ptr + row, mask=is_row, other=0.0).to(tl.float32)
            is_whole = (n + 1) * MINI_BATCH <= end

            # The output, once more up to its normalisation, and its gradient.
            z = _dot(k, weight_n, OPERAND) + bias_n[None, :]
            h, x, rstd, error = _inner_gradient(
                z, k.to(tl.float32), v.to(tl.float32), lr, ln_weight, ln_bias, is_row, is_column, norm_eps, K
            )
            attention = tl.where(causal, _dot(q, tl.trans(k), OPERAND) + 1.0, 0.0)
            u = _dot(attention, h, OPERAND)
            if n == 0:
                gradient = tl.load(gradient_ptr + state + square, mask=is_square, other=0.0)
                gradient_bias = tl.load(gradient_ptr + state + K * K + column, mask=is_column, other=0.0)
                u += _dot(q, gradient, OPERAND) + gradient_bias[None, :]
            z = _dot(q, weight_n, OPERAND) + bias_n[None, :] - scale[:, None] * u
            x_q, rstd_q = _normalise(z, is_column, norm_eps, K)
            dln_weight += tl.sum(dy * x_q, axis=0)
            dln_bias += tl.sum(dy, axis=0)
            dz_q = _project(dy * ln_weight[None, :], x_q, rstd_q, is_column, K)
            dz_q = tl.where(is_row[:, None], dz_q, 0.0)
            dscale -= tl.sum(dz_q * u, axis=1)
            du = -scale[:, None] * dz_q

            # q, and the part of k and h in what the output reads of the mini-batch itself.
            dattention = tl.where(causal, _dot(du, tl.trans(h), OPERAND), 0.0)
            dq = dy + _dot(dz_q, tl.trans(weight_n), OPERAND) + _dot(dattention, k, OPERAND)
            attention_t = tl.where(anticausal, _dot(k, tl.trans(q), OPERAND) + 1.0, 0.0)
            dattention_t = tl.where(anticausal, _dot(h, tl.trans(du), OPERAND), 0.0)
            dk = _dot(dattention_t, q, OPERAND)
            dh = _dot(attention_t, du, OPERAND)

            # The part of k and h in the update of W; sign: of G + k' h in what is handed on.
            sign = tl.where(is_whole, -scale_last, 1.0)
            k_dweight = _dot(k, dweight, OPERAND) + dbias[None, :]
            dh += sign * k_dweight
            dk += sign * _dot(h, tl.trans(dweight), OPERAND)
            dscale_last = tl.sum(k_dweight * h)
            if n == 0:
                gradient = tl.load(gradient_ptr + state + square, mask=is_square, other=0.0)
                gradient_bias = tl.load(gradient_ptr + state + K * K + column, mask=is_column, other=0.0)
                dscale_last += tl.sum(dweight * gradient) + tl.sum(dbias * gradient_bias)
                dq += _dot(du, tl.trans(gradient), OPERAND)
                dgradient = _dot(tl.trans(q), du, OPERAND) + sign * dweight
                tl.store(dgradient_ptr + state + square, dgradient, mask=is_square)
                dgradient_bias = tl.sum(du, axis=0) + sign * dbias
                tl.store(dgradient_ptr + state + K * K + column, dgradient_bias, mask=is_column)
            dscale -= tl.where((i == MINI_BATCH - 1) & is_whole, dscale_last, 0.0)

            # h = rstd P(outer), outer = lr ln_weight error: plain's LossGradientBackward.
            dh = tl.where(is_row[:, None], dh, 0.0)
            douter = _project(dh, x, rstd, is_column, K)
            derror = douter * lr[:, None] * ln_weight[None, :]
            dln_weight += tl.sum(douter * lr[:, None] * (error + ln_weight[None, :] * x), axis=0)
            dln_bias += tl.sum(derror, axis=0)
            outer = lr[:, None] * ln_weight[None, :] * error
            mean_outer_x = tl.sum(outer * x, axis=1)[:, None] / K
            mean_dh_x = tl.sum(dh * x, axis=1)[:, None] / K
            mean_dh_h = tl.sum(dh * h, axis=1)[:, None] / K
            dx = derror * ln_weight[None, :] - rstd * (mean_outer_x * dh + mean_dh_x * outer)
            dz = _project(dx, x, rstd, is_column, K) - rstd * mean_dh_h * x
            dk += derror + _dot(dz, tl.trans(weight_n), OPERAND)

            dlr = tl.sum(douter * ln_weight[None, :] * error, axis=1)
            tl.store(dq_ptr + place, dq.to(dq_ptr.dtype.element_ty), mask=is_place)
            tl.store(dk_ptr + place, dk.to(dk_ptr.dtype.element_ty), mask=is_place)
            tl.store(dv_ptr + place, (-derror).to(dv_ptr.dtype.element_ty), mask=is_place)
            tl.store(dlr_ptr + row, dlr.to(dlr_ptr.dtype.element_ty), mask=is_row)

            if not is_whole:
                dweight = tl.load(dweight_out_ptr + state + square, mask=is_square, other=0.0)
                dbias = tl.load(dweight_out_ptr + state + K * K + column, mask=is_column, other=0.0)
            dweight += _dot(tl.trans(q), dz_q, OPERAND) + _dot(tl.trans(k), dz, OPERAND)
            dbias += tl.sum(dz_q + dz, axis=0)
        tl.debug_barrier()  # the next group writes the scratch again

    tl.store(dweight_ptr + state + square, dweight, mask=is_square)
    tl.store(dweight_ptr + state + K * K + column, dbias, mask=is_column)
    tl.store(dscale_ptr + program * MINI_BATCH + i, dscale, mask=i < MINI_BATCH)
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
    square = column[:, None] * K + column[None, :]
    is_square = is_column[:, None] & is_column[None, :]
    is_row = tl.full((1,), 1, tl.int1)
    ln_weight = tl.load(ln_weight_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + head * K + column, mask=is_column, other=0.0).to(tl.float32)
    q = tl.load(q_ptr + program * K + column, mask=is_column, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + program * K + column, mask=is_column, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + program * K + column, mask=is_column, other=0.0).to(tl.float32)
    lr = tl.load(lr_ptr + program).to(tl.float32)
    scale = tl.load(scale_ptr + position).to(tl.float32)
    state = program * (K + 1) * K
    weight = tl.load(weight_ptr + state + square, mask=is_square, other=0.0)
    bias = tl.load(weight_ptr + state + K * K + column, mask=is_column, other=0.0)
    gradient = tl.load(gradient_ptr + state + square, mask=is_square, other=0.0)
    gradient_bias = tl.load(gradient_ptr + state + K * K + column, mask=is_column, other=0.0)

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
        tl.store(weight_out_ptr + state + square, weight, mask=is_square)
        tl.store(weight_out_ptr + state + K * K + column, bias, mask=is_column)
        gradient = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
        gradient_bias = tl.zeros((BLOCK_K,), tl.float32)
    tl.store(gradient_out_ptr + state + square, gradient, mask=is_square)
    tl.store(gradient_out_ptr + state + K * K + column, gradient_bias, mask=is_column)


def _constants(q: Tensor, k: Tensor, token_scale: Tensor) -> dict[str, Any]:
    """What the kernels of a sequence are compiled for."""
    width, mini_batch_tokens = q.shape[-1], token_scale.shape[0]
    block_tokens = max(16, triton.next_power_of_2(mini_batch_tokens))
    block_width = max(16, triton.next_power_of_2(width))
    is_bfloat16 = q.dtype == k.dtype == torch.bfloat16
    return {
        "K": width,
        "MINI_BATCH": mini_batch_tokens,
        "BLOCK_T": block_tokens,
        "BLOCK_K": block_width,
        "OPERAND": tl.bfloat16 if is_bfloat16 else tl.float32,
        **launch_options(block_tokens, block_width),
    }


def _sizes(q: Tensor, token_scale: Tensor, position: int, norm_eps: float) -> tuple[int, int, int, int, float]:
    """num_tokens, position, num_mini_batches, num_heads and norm_eps as the kernels take them."""
    num_tokens, num_heads = q.shape[1], q.shape[2]
    return num_tokens, position, triton.cdiv(position + num_tokens, token_scale.shape[0]), num_heads, norm_eps


def _forward(
    inputs: tuple[Tensor, ...], position: int, norm_eps: float, checkpoint: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, weight and gradient after the tokens, and the weights before every `checkpoint` mini-batches,
    (B, H, N, K + 1, K), of which there are none for 0."""
    q, k, _, _, token_scale, _, _, weight, gradient = inputs
    batch_size, _, num_heads, width = q.shape
    sizes = _sizes(q, token_scale, position, norm_eps)
    y, weight_after, gradient_after = torch.empty_like(q), torch.empty_like(weight), torch.empty_like(weight)
    num_checkpoints = triton.cdiv(sizes[2], checkpoint) if checkpoint else 0
    checkpoints = weight.new_empty(batch_size, num_heads, num_checkpoints, width + 1, width)
    constants = _constants(q, k, token_scale)
    _forward_kernel[(batch_size * num_heads,)](
        *inputs, y, weight_after, gradient_after, checkpoints, *sizes, CHECKPOINT=checkpoint, **constants
    )
    return y, weight_after, gradient_after, checkpoints


def _decode(
    inputs: tuple[Tensor, ...], position: int, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, weight and gradient after one token; the weight is the one given while its mini-batch is open."""
    q, token_scale, weight = inputs[0], inputs[4], inputs[7]
    batch_size, _, num_heads, width = q.shape
    is_last = position + 1 == token_scale.shape[0]
    y, gradient_after = torch.empty_like(q), torch.empty_like(weight)
    weight_after = torch.empty_like(weight) if is_last else weight
    block_width = max(16, triton.next_power_of_2(width))
    _decode_kernel[(batch_size * num_heads,)](
        *inputs, y, weight_after, gradient_after, position, num_heads, norm_eps,
        K=width, BLOCK_K=block_width, IS_LAST=is_last, **launch_options(1, block_width),
    )  # fmt: skip
    return y, weight_after, gradient_after


class _TTTLinear(torch.autograd.Function):
    """q, k, v, lr, token_scale, ln_weight, ln_bias, weight, gradient, all contiguous, then position and norm_eps
    -> y, weight, gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, position, norm_eps = arguments
        ctx.position, ctx.norm_eps = position, norm_eps
        ctx.checkpoint = checkpoint_mini_batches(inputs[4].shape[0])
        y, weight, gradient, checkpoints = _forward(tuple(inputs), position, norm_eps, ctx.checkpoint)
        ctx.save_for_backward(*inputs[:7], inputs[8], checkpoints)  # the first checkpoint is the weight
        return y, weight, gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_weight: Tensor, d_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, open_gradient, checkpoints = ctx.saved_tensors
        q, k, v, lr, token_scale, ln_weight, ln_bias = inputs
        batch_size, num_tokens, num_heads, width = q.shape
        num_programs, mini_batch_tokens = batch_size * num_heads, token_scale.shape[0]
        d_weight, d_gradient = d_weight.contiguous(), d_gradient.contiguous()
        is_open = (ctx.position + num_tokens) % mini_batch_tokens != 0
        d_tokens = [torch.empty_like(t) for t in (q, k, v, lr)]
        d_scale = open_gradient.new_empty(num_programs, mini_batch_tokens)
        d_ln = [open_gradient.new_empty(batch_size, num_heads, width) for _ in range(2)]
        d_state = [torch.empty_like(open_gradient) for _ in range(2)]
        constants = _constants(q, k, token_scale)
        operand = torch.bfloat16 if constants["OPERAND"] == tl.bfloat16 else torch.float32
        scratch = q.new_empty(num_programs, ctx.checkpoint, width, width, dtype=operand)
        scratch_bias = open_gradient.new_empty(num_programs, ctx.checkpoint, width)
        _backward_kernel[(num_programs,)](
            *inputs, open_gradient, checkpoints,
            dy.contiguous(), d_weight, d_gradient if is_open else d_weight,
            *d_tokens, d_scale, *d_ln, *d_state, scratch, scratch_bias,
            *_sizes(q, token_scale, ctx.position, ctx.norm_eps), CHECKPOINT=ctx.checkpoint, **constants,
        )  # fmt: skip
        d_shared = (d_scale.sum(0).to(token_scale.dtype), d_ln[0].sum(0).to(ln_weight.dtype))
        return *d_tokens, *d_shared, d_ln[1].sum(0).to(ln_bias.dtype), *d_state, None, None


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

    Raises ImplementationUnavailable for another state dtype, K > 128 or b > 64."""
    if state.weight.dtype != torch.float32:
        raise ImplementationUnavailable(
            f"implementation 'triton' of ttt_linear computes in float32, not {state.weight.dtype}; "
            "choose another implementation."
        )
    if q.shape[-1] > MAX_HEAD_WIDTH or token_scale.shape[0] > MAX_MINI_BATCH_TOKENS:
        raise ImplementationUnavailable(
            f"implementation 'triton' of ttt_linear has room on chip for head width {MAX_HEAD_WIDTH} and "
            f"mini-batches of {MAX_MINI_BATCH_TOKENS} tokens, not {q.shape[-1]} and {token_scale.shape[0]}; "
            "choose another implementation."
        )
    inputs = tuple(t.contiguous() for t in (q, k, v, lr, token_scale, ln_weight, ln_bias, *state))
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        y, weight, gradient = _TTTLinear.apply(*inputs, position, norm_eps)
    elif q.shape[1] == 1:
        y, weight, gradient = _decode(inputs, position, norm_eps)
    else:
        y, weight, gradient, _ = _forward(inputs, position, norm_eps, checkpoint=0)
    return y, TTTLinearWeights(weight, gradient)
