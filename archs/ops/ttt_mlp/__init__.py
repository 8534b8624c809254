"""TTT-MLP: a layer whose state is a two-layer network trained by gradient steps on its own input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archs.ops.operation import Implementation, Operation, triton_kernel
from archs.ops.ttt_linear import check_position

OPERATION = Operation(
    name="ttt_mlp",
    implementations={
        "reference": Implementation(target="archs.ops.ttt_mlp.reference:ttt_mlp"),
        "plain": Implementation(target="archs.ops.ttt_mlp.plain:ttt_mlp"),
        "triton": triton_kernel("archs.ops.ttt_mlp.kernel:ttt_mlp"),
    },
    auto={"cpu": ["plain"], "cuda": ["plain"]},
)


class TTTMLPWeights(NamedTuple):
    """The inner network at the start of the open mini-batch, biases in the last rows:
    weight_in (B, H, K + 1, 4K), weight_out (B, H, 4K + 1, K). The gradients, of the same shapes, are
    the sums of lr_j grad_j over the open mini-batch's tokens."""

    weight_in: Tensor
    weight_out: Tensor
    gradient_in: Tensor
    gradient_out: Tensor


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: TTTMLPWeights,
    position: int,
    *,
    norm_eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[Tensor, TTTMLPWeights]:
    """TTT-MLP with mini-batch gradient descent (Sun et al. 2024, arXiv 2407.04620, section 2.7).

    As archs.ops.ttt_linear.ttt_linear, shapes and errors included, with the inner model
    f(x) = x + LN(gelu(x W_in + bias_in) W_out + bias_out), GELU in its tanh form.
    """
    check_position(position, token_scale.shape[0])
    tensors = (q, k, v, lr, token_scale, ln_weight, ln_bias)
    function, inputs = OPERATION.function_and_inputs(implementation, tensors, state.weight_in.dtype)
    with torch.autocast(q.device.type, enabled=False):
        y, state = function(*inputs, state, position, norm_eps=norm_eps)
    return y.to(q.dtype), state
