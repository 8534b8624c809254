"""TTT-MLP's decoding of one token in Triton: three launches, spread over heads and hidden columns.

A step reads the state and writes half of it, with a few operations a number: it takes as long as the memory
does, and the memory is busy only if the whole card asks. So a program takes FB hidden columns of one (batch,
head), which makes 256 programs for one sequence of the 1.3B model (32 heads of width 64). The columns meet in
two sums, Z2 before the inner gradient and Z2(q) before the output; hence three launches. Programs leave
their parts of a sum in a scratch, and each that needs it adds them all in the same order: no atomics, and the
same bits in every run.

    launch    of the state    gives
    read      W1, W2          Z1, a part of Z2; and q~ W1, so that W1 is not read again
    update    W2, G1, G2      Z2, h2, h1, the new G1 and G2, a part of Z2(q)
    answer                    Z2(q), y

W2 is read twice, the second time from the L2 where a layer's weights fit; the step that closes a mini-batch
reads W1 again as well, and writes both. Products of one row are sums in float32: of tl.dot's 16 rows 15 would
be padding.

Letters as in archs.ops.ttt_mlp.kernel_forward; BLOCKS is the number of blocks of FB hidden columns.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from archs.ops.ttt_mlp.kernel_forward import (
    gelu_derivatives,
    load_block,
    normalise,
    normalise_backward,
    store_block,
)

HIDDEN_BLOCK = 32  # FB: a row of W1's block is one line of the cache, 128 bytes


@triton.jit
def _load_row(pointer, columns, is_column):
    return tl.load(pointer + columns, mask=is_column, other=0.0).to(tl.float32)


@triton.jit
def _sum_of_parts(parts_ptr, columns, is_column, K: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """The sum (KP,) of BLOCKS rows of K numbers."""
    rows = tl.arange(0, PADDED)
    mask = (rows[:, None] < BLOCKS) & is_column[None, :]
    return tl.sum(tl.load(parts_ptr + rows[:, None] * K + columns[None, :], mask=mask, other=0.0), 0)


@triton.jit
def _read_kernel(
    q_ptr, k_ptr, w1_ptr, w2_ptr, hidden_ptr, parts_ptr,
    K: tl.constexpr, KP: tl.constexpr, FB: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Z1 and q~ W1 into hidden (M, 2, F), the block's part of gelu(Z1) W2 into parts (M, BLOCKS, K)."""
    F: tl.constexpr = 4 * K
    m, block = tl.program_id(0).to(tl.int64) // BLOCKS, tl.program_id(0) % BLOCKS
    columns, hidden = tl.arange(0, KP), block * FB + tl.arange(0, FB)
    is_column = columns < K
    weight1, bias1, weight2 = load_block(
        w1_ptr + m * (K + 1) * F, w2_ptr + m * (F + 1) * K, block * FB, K, F, KP, FB
    )
    q, k = _load_row(q_ptr + m * K, columns, is_column), _load_row(k_ptr + m * K, columns, is_column)
    z1 = tl.sum(k[:, None] * weight1, 0) + bias1
    zq1 = tl.sum(q[:, None] * weight1, 0) + bias1
    x2, _, _ = gelu_derivatives(z1)
    tl.store(hidden_ptr + m * 2 * F + hidden, z1, mask=hidden < F)
    tl.store(hidden_ptr + m * 2 * F + F + hidden, zq1, mask=hidden < F)
    part = tl.sum(x2[:, None] * weight2, 0)  # columns past F have zeros in W2
    tl.store(parts_ptr + (m * BLOCKS + block) * K + columns, part, mask=is_column)


@triton.jit(do_not_specialize=["position"])
def _update_kernel(
    q_ptr, k_ptr, v_ptr, lr_ptr, scale_ptr, ln_weight_ptr, ln_bias_ptr, w1_ptr, w2_ptr, g1_ptr, g2_ptr,
    w1_out_ptr, w2_out_ptr, g1_out_ptr, g2_out_ptr, hidden_ptr, parts_ptr, q_parts_ptr,
    position, num_heads, eps,
    K: tl.constexpr, KP: tl.constexpr, FB: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
    IS_LAST: tl.constexpr,
):  # fmt: skip
    """The block's columns of the new open gradient, and its part of Z2(q) into q_parts (M, BLOCKS, K).
    IS_LAST where the token closes its mini-batch: then the weights are written and the gradient is zeros,
    else w_out is not written."""
    F: tl.constexpr = 4 * K
    m, block = tl.program_id(0).to(tl.int64) // BLOCKS, tl.program_id(0) % BLOCKS
    layer1, layer2 = m * (K + 1) * F, m * (F + 1) * K
    start = block * FB
    columns, hidden = tl.arange(0, KP), start + tl.arange(0, FB)
    is_column = columns < K
    is_value = is_column[None, :]
    weight1, bias1, weight2 = load_block(w1_ptr + layer1, w2_ptr + layer2, start, K, F, KP, FB)
    open1, open_b, open2 = load_block(g1_ptr + layer1, g2_ptr + layer2, start, K, F, KP, FB)
    bias2 = _load_row(w2_ptr + layer2 + F * K, columns, is_column)
    open2_b = _load_row(g2_ptr + layer2 + F * K, columns, is_column)
    q, k = _load_row(q_ptr + m * K, columns, is_column), _load_row(k_ptr + m * K, columns, is_column)
    v = _load_row(v_ptr + m * K, columns, is_column)
    ln_weight = _load_row(ln_weight_ptr + m % num_heads * K, columns, is_column)
    ln_bias = _load_row(ln_bias_ptr + m % num_heads * K, columns, is_column)
    lr, s = tl.load(lr_ptr + m).to(tl.float32), tl.load(scale_ptr + position).to(tl.float32)
    z1 = tl.load(hidden_ptr + m * 2 * F + hidden, mask=hidden < F, other=0.0)
    zq1 = tl.load(hidden_ptr + m * 2 * F + F + hidden, mask=hidden < F, other=0.0)
    z2 = _sum_of_parts(parts_ptr + m * BLOCKS * K, columns, is_column, K, BLOCKS, PADDED) + bias2

    x, rstd = normalise(z2[None, :], is_value, eps, K)
    outer = lr * ln_weight * (ln_weight * x + ln_bias - v + k)
    h2 = normalise_backward(outer, x, rstd, is_value, K)  # (1, KP)
    x2, slope, _ = gelu_derivatives(z1)
    h1 = tl.sum(h2 * weight2, 1) * slope
    open1, open_b = open1 + k[:, None] * h1[None, :], open_b + h1
    open2, open2_b = open2 + x2[:, None] * h2, open2_b + tl.sum(h2, 0)

    xq, _, _ = gelu_derivatives(zq1 - s * (tl.sum(q[:, None] * open1, 0) + open_b))
    weight2, bias2 = weight2 - s * open2, bias2 - s * open2_b
    is_first = is_column & (block == 0)  # whose program has the bias of the second layer too
    part = tl.sum(xq[:, None] * weight2, 0) + tl.where(is_first, bias2, 0.0)
    tl.store(q_parts_ptr + (m * BLOCKS + block) * K + columns, part, mask=is_column)
    if IS_LAST:
        weight1, bias1 = weight1 - s * open1, bias1 - s * open_b
        store_block(w1_out_ptr + layer1, w2_out_ptr + layer2, weight1, bias1, weight2, start, K, F, KP, FB)
        tl.store(w2_out_ptr + layer2 + F * K + columns, bias2, mask=is_first)
        open1, open2 = tl.zeros((KP, FB), tl.float32), tl.zeros((FB, KP), tl.float32)
        open_b, open2_b = tl.zeros((FB,), tl.float32), tl.zeros((KP,), tl.float32)
    store_block(g1_out_ptr + layer1, g2_out_ptr + layer2, open1, open_b, open2, start, K, F, KP, FB)
    tl.store(g2_out_ptr + layer2 + F * K + columns, open2_b, mask=is_first)


@triton.jit
def _answer_kernel(
    q_ptr, ln_weight_ptr, ln_bias_ptr, q_parts_ptr, y_ptr,
    num_heads, eps,
    K: tl.constexpr, KP: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """y = q + LN(Z2(q)), one program a (batch, head)."""
    m = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, KP)
    is_column = columns < K
    q = _load_row(q_ptr + m * K, columns, is_column)
    ln_weight = _load_row(ln_weight_ptr + m % num_heads * K, columns, is_column)
    ln_bias = _load_row(ln_bias_ptr + m % num_heads * K, columns, is_column)
    zq2 = _sum_of_parts(q_parts_ptr + m * BLOCKS * K, columns, is_column, K, BLOCKS, PADDED)
    x, _ = normalise(zq2[None, :], is_column[None, :], eps, K)
    y = q + ln_weight * tl.sum(x, 0) + ln_bias
    tl.store(y_ptr + m * K + columns, y.to(y_ptr.dtype.element_ty), mask=is_column)


def decode(
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    opened: tuple[Tensor, ...],
    y: Tensor,
    new_weights: tuple[Tensor, ...],
    new_opened: tuple[Tensor, ...],
    position: int,
    norm_eps: float,
) -> None:
    """One token at `position` of its mini-batch: writes y, the open gradient, and the new weights where the
    token closes the mini-batch. inputs are q, k, v, lr, token_scale, ln_weight, ln_bias with T = 1, weights
    and opened two tensors each; all are contiguous. Nothing is asked of the device."""
    q, k, _, _, token_scale, ln_weight, ln_bias = inputs
    batch_size, _, num_heads, width = q.shape
    num_programs, num_blocks = batch_size * num_heads, triton.cdiv(4 * width, HIDDEN_BLOCK)
    hidden = weights[0].new_empty(num_programs, 2, 4 * width)
    parts, q_parts = (weights[0].new_empty(num_programs, num_blocks, width) for _ in range(2))
    padded, padded_blocks = max(16, triton.next_power_of_2(width)), triton.next_power_of_2(num_blocks)
    sizes = {"K": width, "KP": padded, "BLOCKS": num_blocks}
    of_blocks = {**sizes, "FB": HIDDEN_BLOCK, "num_warps": 8 if padded > 64 else 4}
    _read_kernel[(num_programs * num_blocks,)](q, k, *weights, hidden, parts, **of_blocks)
    _update_kernel[(num_programs * num_blocks,)](
        *inputs, *weights, *opened, *new_weights, *new_opened, hidden, parts, q_parts,
        position, num_heads, norm_eps,
        PADDED=padded_blocks, IS_LAST=position + 1 == token_scale.shape[0], **of_blocks,
    )  # fmt: skip
    _answer_kernel[(num_programs,)](
        q, ln_weight, ln_bias, q_parts, y, num_heads, norm_eps, PADDED=padded_blocks, num_warps=1, **sizes
    )
