"""TTT-Linear as defined: one token at a time, the inner gradient by automatic differentiation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops.ttt_linear import TTTLinearWeights


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis of x (B, H, K), with weight and bias (H, K) a head."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias


def inner_gradients(loss: Tensor, weights: list[Tensor], is_differentiable: bool) -> tuple[Tensor, ...]:
    """d loss / d weights; part of the outer graph where `is_differentiable`."""
    return torch.autograd.grad(loss, weights, create_graph=is_differentiable)


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
    """See archs.ops.ttt_linear.ttt_linear."""
    is_differentiable = torch.is_grad_enabled()
    weight, gradient = state

    def f_res(x: Tensor, weight: Tensor) -> Tensor:
        z = torch.einsum("bhi,bhio->bho", x, weight[:, :, :-1]) + weight[:, :, -1]
        return layer_norm(z, ln_weight, ln_bias, norm_eps)

    outputs = []
    for t in range(q.shape[1]):
        with torch.enable_grad():
            start = weight if weight.requires_grad else weight.detach().requires_grad_()
            error = k[:, t] + f_res(k[:, t], start) - v[:, t]
            loss = (lr[:, t] * error.square().sum(dim=-1) / 2).sum()
            (step,) = inner_gradients(loss, [start], is_differentiable)
        gradient = gradient + step
        updated = weight - token_scale[position] * gradient
        outputs.append(q[:, t] + f_res(q[:, t], updated))
        position += 1
        if position == token_scale.shape[0]:
            weight, gradient, position = updated, torch.zeros_like(gradient), 0
    return torch.stack(outputs, dim=1), TTTLinearWeights(weight, gradient)
