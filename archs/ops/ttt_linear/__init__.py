"""TTT-Linear: a layer whose state is a linear model trained by gradient steps on its own input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archs.ops.operation import Implementation, Operation, triton_kernel

OPERATION = Operation(
    name="ttt_linear",
    implementations={
        "reference": Implementation(target="archs.ops.ttt_linear.reference:ttt_linear"),
        "plain": Implementation(target="archs.ops.ttt_linear.plain:ttt_linear"),
        "triton": triton_kernel("archs.ops.ttt_linear.kernel:ttt_linear"),
    },
    auto={"cpu": ["plain"], "cuda": ["plain"]},
)


class TTTLinearWeights(NamedTuple):
    """weight (B, H, K + 1, K): the inner model at the start of the open mini-batch, the bias in the
    last row. gradient: as weight, the sum of lr_j grad_j over the open mini-batch's tokens."""

    weight: Tensor
    gradient: Tensor


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
    norm_eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[Tensor, TTTLinearWeights]:
    """TTT-Linear with mini-batch gradient descent (Sun et al. 2024, arXiv 2407.04620, sections 2.3
    to 2.5 and 2.7).

    The inner model is f(x) = x + LN(x W + bias); its loss at token j is
    1/2 |f(k_j) - v_j|^2, taken at the weights W_0 from the start of the mini-batch. Token i of a
    mini-batch reads y_i = f(q_i) at W_i = W_0 - token_scale_i sum_{j<=i} lr_j grad_j, and the last
    token's W is the next mini-batch's W_0.

    q, k, v (B, T, H, K); lr (B, T, H); token_scale (b,) for a mini-batch of b tokens; ln_weight and
    ln_bias (H, K); position: how many tokens the open mini-batch already holds, 0 <= position < b.
    Returns y (B, T, H, K) in q's dtype, and the state after the T tokens, in the given state's
    dtype, which is also the dtype of the arithmetic. Differentiable in every tensor.

    Raises ValueError for a position outside the mini-batch, ImplementationUnavailable where the
    implementation cannot run.
    """
    check_position(position, token_scale.shape[0])
    tensors = (q, k, v, lr, token_scale, ln_weight, ln_bias)
    function, inputs = OPERATION.function_and_inputs(implementation, tensors, state.weight.dtype)
    with torch.autocast(q.device.type, enabled=False):
        y, state = function(*inputs, state, position, norm_eps=norm_eps)
    return y.to(q.dtype), state


def check_position(position: int, mini_batch_tokens: int) -> None:
    """Raises ValueError unless 0 <= position < mini_batch_tokens."""
    if not 0 <= position < mini_batch_tokens:
        raise ValueError(f"position={position} must lie inside the mini-batch of {mini_batch_tokens} tokens")
