"""TTT-MLP as defined: one token at a time, the inner gradient by automatic differentiation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops.ttt_linear.reference import inner_gradients, layer_norm
from archs.ops.ttt_mlp import TTTMLPWeights


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
    norm_eps: float,
) -> tuple[Tensor, TTTMLPWeights]:
    """See archs.ops.ttt_mlp.ttt_mlp."""
    is_differentiable = torch.is_grad_enabled()
    weights, gradients = list(state[:2]), list(state[2:])

    def f_res(x: Tensor, weights: list[Tensor]) -> Tensor:
        weight_in, weight_out = weights
        z = torch.einsum("bhi,bhio->bho", x, weight_in[:, :, :-1]) + weight_in[:, :, -1]
        x = F.gelu(z, approximate="tanh")
        z = torch.einsum("bhi,bhio->bho", x, weight_out[:, :, :-1]) + weight_out[:, :, -1]
        return layer_norm(z, ln_weight, ln_bias, norm_eps)

    outputs = []
    for t in range(q.shape[1]):
        with torch.enable_grad():
            start = [w if w.requires_grad else w.detach().requires_grad_() for w in weights]
            error = k[:, t] + f_res(k[:, t], start) - v[:, t]
            loss = (lr[:, t] * error.square().sum(dim=-1) / 2).sum()
            steps = inner_gradients(loss, start, is_differentiable)
        gradients = [g + step for g, step in zip(gradients, steps, strict=True)]
        updated = [w - token_scale[position] * g for w, g in zip(weights, gradients, strict=True)]
        outputs.append(q[:, t] + f_res(q[:, t], updated))
        position += 1
        if position == token_scale.shape[0]:
            weights, gradients, position = updated, [torch.zeros_like(g) for g in gradients], 0
    return torch.stack(outputs, dim=1), TTTMLPWeights(*weights, *gradients)
