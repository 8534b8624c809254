"""TTT-MLP in the dual form (arXiv 2407.04620, section 2.5 and appendix A): matrix products only.

Letters as in archs.ops.ttt_linear.plain, with 1 for the inner network's first layer and 2 for its
second:

    Z1 = k~ W1, X2 = gelu(Z1), Z2 = X2~ W2
    h2 = lr * dl/dZ2, h1 = lr * dl/dZ1 = (h2 W2') * gelu'(Z1)
    W1 <- W1 - token_scale_last k~' h1, W2 <- W2 - token_scale_last X2~' h2
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from archs.ops.elementwise import GELU_CUBE, GELU_SLOPE, gelu, gelu_gate
from archs.ops.ttt_linear.plain import (
    LossGradientBackward,
    Tokens,
    arrange,
    loss_gradient,
    output,
    segments,
    without_autocast,
)
from archs.ops.ttt_mlp import TTTMLPWeights


def gelu_backward(d_x: Tensor, z: Tensor) -> Tensor:
    """d_x * gelu'(z)."""
    return torch.ops.aten.gelu_backward(d_x, z, approximate="tanh")


def gelu_derivative(z: Tensor, gate: Tensor, slope: Tensor) -> Tensor:
    """gelu'(z), from `gelu_gate(z, slope)`."""
    inner = torch.addcmul(slope, z, z, value=3 * GELU_CUBE * GELU_SLOPE)
    return torch.addcmul(gate, torch.ops.aten.sigmoid_backward(z, gate), inner)


def gelu_second_derivative(z: Tensor) -> Tensor:
    """gelu''(z): with u = sqrt(2 / pi) (z + a z^3) and t = tanh u,
    (1 - t^2) (u' + z (u'' / 2 - t u'^2))."""
    scale, a = math.sqrt(2 / math.pi), 0.044715
    square = z * z
    t = (square * (scale * a)).add_(scale).mul_(z).tanh_()
    slope = square.mul_(3 * scale * a).add_(scale)
    bend = (z * (3 * scale * a)).addcmul_(t, slope.square(), value=-1)
    return slope.addcmul_(z, bend).mul_(t.square_().neg_().add_(1))


class InnerScan(torch.autograd.Function):
    """The serial part. k~ (N, M, b, f + 1), update = last k~, last = token_scale_last (), offset and
    slope (N, M, b, f), W1 (M, f + 1, 4f), W2 (M, 4f + 1, f) -> h1 (N, M, b, 4f), h2 (N, M, b, f),
    X2~ (N, M, b, 4f + 1), W1 and W2 before each mini-batch (N, M, ...) and after the last."""

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        update: Tensor,
        last: Tensor,
        offset: Tensor,
        slope: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        norm_eps: float,
    ) -> tuple[Tensor, ...]:
        num_mini_batches, width = k.shape[0], weight1.shape[-1]
        weights1 = weight1.new_empty(num_mini_batches, *weight1.shape)
        weights2 = weight2.new_empty(num_mini_batches, *weight2.shape)
        weights1[0], weights2[0] = weight1, weight2
        after1, after2 = torch.empty_like(weight1), torch.empty_like(weight2)
        h1, h2 = k.new_empty(*k.shape[:-1], width), torch.empty_like(offset)
        z1, z2 = torch.empty_like(h1), torch.empty_like(h2)
        x2 = k.new_ones(*k.shape[:-1], width + 1)
        next1, next2 = [*weights1.unbind()[1:], after1], [*weights2.unbind()[1:], after2]
        for n in range(num_mini_batches):
            w1, w2, x, h, z = weights1[n], weights2[n], x2[n], h2[n], z1[n]
            torch.bmm(k[n], w1, out=z)
            x[..., :-1] = gelu(z)
            torch.bmm(x, w2, out=z2[n])
            h.copy_(loss_gradient(z2[n], offset[n], slope[n], norm_eps))
            h1[n] = gelu_backward(torch.bmm(h, w2[:, :-1].mT), z)
            torch.baddbmm(w1, update[n].mT, h1[n], alpha=-1, out=next1[n])
            torch.baddbmm(w2, x.mT, h * last, alpha=-1, out=next2[n])
        ctx.save_for_backward(k, update, last, offset, slope, z1, x2, z2, h1, h2, weights1, weights2)
        ctx.norm_eps = norm_eps
        return h1, h2, x2, weights1, weights2, after1, after2

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_h1, d_h2, d_x2, d_weights1, d_weights2, d_weight1, d_weight2 = gradients
        k, update, last, offset, slope, z1, x2, z2, h1, h2, weights1, weights2 = ctx.saved_tensors
        inner = LossGradientBackward(z2, offset, slope, h2, ctx.norm_eps)
        ones = torch.ones_like(z1[0])
        d_u = torch.zeros_like(x2[0])  # a zero column beside it meets the bias of W2
        d_u_inner = d_u[..., :-1]
        d_z1, d_update, pulled = torch.empty_like(z1), torch.empty_like(update), torch.empty_like(h2)
        for n in reversed(range(k.shape[0])):
            z, w2, h = z1[n], weights2[n], h2[n]
            # W2 after = W2 - last X2~' h2 and W1 after = W1 - update' h1
            torch.bmm(x2[n], d_weight2, out=pulled[n])
            d_h = torch.addcmul(d_h2[n], pulled[n], last, value=-1)
            d_x = torch.baddbmm(d_x2[n], h * last, d_weight2.mT, alpha=-1)
            torch.bmm(h1[n], d_weight1.mT, out=d_update[n])
            d_g = torch.baddbmm(d_h1[n], update[n], d_weight1, alpha=-1)
            # h1 = u gelu'(Z1) with u = h2 W2' (no bias)
            derivative = gelu_backward(ones, z)
            torch.mul(d_g, derivative, out=d_u_inner)
            d_h = torch.baddbmm(d_h, d_u, w2)
            # h2 = lr dl/dZ2, Z2 = X2~ W2, X2 = gelu(Z1), Z1 = k~ W1
            d_z2 = inner.step(n, d_h)
            d_x = torch.baddbmm(d_x, d_z2, w2.mT)
            u = torch.bmm(h, w2[:, :-1].mT)
            d_z = d_g.mul_(u).mul_(gelu_second_derivative(z))
            torch.addcmul(d_z, d_x[..., :-1], derivative, out=d_z1[n])
            d_weight2 = torch.baddbmm(d_weight2 + d_weights2[n], x2[n].mT, d_z2)
            d_weight2.baddbmm_(d_u.mT, h)
            d_weight1 = torch.baddbmm(d_weight1 + d_weights1[n], k[n].mT, d_z1[n])
        d_k, d_last = d_z1 @ weights1.mT, -(pulled * h2).sum()
        d_inner = (inner.d_offset, inner.d_slope())
        return d_k, d_update.neg_(), d_last, *d_inner, d_weight1, d_weight2, None


def _whole_mini_batches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, N b, H, K) from the start of a mini-batch; weights (B H, ...)."""
    tokens = arrange(q, k, v, lr, ln_weight, ln_bias, token_scale.shape[0])
    last = token_scale[-1]
    h1, h2, x2, weights1, weights2, weight1, weight2 = InnerScan.apply(
        tokens.k, tokens.k * last, last, tokens.offset, tokens.slope, weight1, weight2, norm_eps
    )
    mask = token_scale[:, None].expand(-1, token_scale.shape[0]).tril()
    z = tokens.q @ weights1 - ((tokens.q @ tokens.k.mT) * mask) @ h1
    x = F.pad(gelu(z), (0, 1), value=1.0)
    z = x @ weights2 - ((x @ x2.mT) * mask) @ h2
    return output(z, q, ln_weight, ln_bias, norm_eps), weight1, weight2


def _read_whole_mini_batches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_whole_mini_batches` without gradients: the weights are kept once and updated in place,
    which saves copying them every mini-batch; q and k go through the first layer together. Buffers and
    views of them are made once, since a call costs as much as its arithmetic here."""
    b = token_scale.shape[0]
    tokens = arrange(q, k, v, lr, ln_weight, ln_bias, b)
    last, mask = token_scale[-1], token_scale[:, None].expand(-1, b).tril()
    attention1 = (tokens.q @ tokens.k.mT) * mask
    update1 = (tokens.k * last).mT
    w1, w2 = weight1.clone(), weight2.clone()
    back2 = w2[:, :-1].mT
    gelu_slope = torch.full_like(last, GELU_SLOPE)
    y = torch.empty_like(tokens.offset)
    z1 = y.new_empty(w1.shape[0], 2 * b, w1.shape[-1])
    z_k, z_q = z1.split(b, dim=1)
    x_k, x_q = y.new_ones(2, w1.shape[0], b, w1.shape[-1] + 1)
    gelu_k, gelu_q, update2 = x_k[..., :-1], x_q[..., :-1], x_k.mT
    k_and_q = torch.cat((tokens.k, tokens.q), dim=2)
    steps = zip(k_and_q, attention1, update1, tokens.offset, tokens.slope, y, strict=True)
    for k_and_q_n, attention1_n, update1_n, offset, slope, y_n in steps:
        torch.bmm(k_and_q_n, w1, out=z1)
        gate = gelu_gate(z_k, gelu_slope)
        torch.mul(z_k, gate, out=gelu_k)
        h2 = loss_gradient(torch.bmm(x_k, w2), offset, slope, norm_eps)
        h1 = torch.bmm(h2, back2).mul_(gelu_derivative(z_k, gate, gelu_slope))
        z = torch.baddbmm(z_q, attention1_n, h1, alpha=-1)
        torch.mul(z, gelu_gate(z, gelu_slope), out=gelu_q)
        attention2 = torch.bmm(x_q, update2).mul_(mask)
        torch.baddbmm(torch.bmm(x_q, w2), attention2, h2, alpha=-1, out=y_n)
        torch.baddbmm(w1, update1_n, h1, alpha=-1, out=w1)
        torch.baddbmm(w2, update2, h2.mul_(last), alpha=-1, out=w2)
    return output(y, q, ln_weight, ln_bias, norm_eps), w1, w2


def _part_of_mini_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    gradient1: Tensor,
    gradient2: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """c tokens of one mini-batch with their token_scale (c,); weights and gradients (B H, ...).
    Returns y and the gradients."""
    num_tokens = q.shape[1]
    tokens = Tokens(*(x[0] for x in arrange(q, k, v, lr, ln_weight, ln_bias, num_tokens)))
    scale = token_scale[:, None]
    z1 = tokens.k @ weight1
    x2 = F.pad(gelu(z1), (0, 1), value=1.0)
    h2 = loss_gradient(x2 @ weight2, tokens.offset, tokens.slope, norm_eps)
    h1 = gelu_backward(h2 @ weight2[:, :-1].mT, z1)
    z = tokens.q @ weight1 - scale * (tokens.q @ gradient1 + (tokens.q @ tokens.k.mT).tril() @ h1)
    x = F.pad(gelu(z), (0, 1), value=1.0)
    z = x @ weight2 - scale * (x @ gradient2 + (x @ x2.mT).tril() @ h2)
    gradient1 = torch.baddbmm(gradient1, tokens.k.mT, h1)
    gradient2 = torch.baddbmm(gradient2, x2.mT, h2)
    return output(z[None], q, ln_weight, ln_bias, norm_eps), gradient1, gradient2


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
    """See archs.ops.ttt_mlp.ttt_mlp. Where gradients are asked for over several groups of
    mini-batches, each group is computed again in the backward pass: kept, the weights before each
    mini-batch would be most of the memory."""
    mini_batch_tokens = token_scale.shape[0]
    weight1, weight2, gradient1, gradient2 = (w.flatten(0, 1) for w in state)
    outputs = []
    cuts = segments(q.shape[1], position, mini_batch_tokens)
    num_whole = sum((stop - start) >= mini_batch_tokens for start, stop in cuts)
    whole = _whole_mini_batches if torch.is_grad_enabled() else _read_whole_mini_batches
    is_checkpointed = torch.is_grad_enabled() and num_whole > 1
    for start, stop in cuts:
        q_n, k_n, v_n, lr_n = (x[:, start:stop] for x in (q, k, v, lr))
        if position == 0 and (stop - start) % mini_batch_tokens == 0:
            outer, inner = (token_scale, ln_weight, ln_bias), (weight1, weight2)
            if is_checkpointed:
                y, weight1, weight2 = checkpoint(
                    *(whole, q_n, k_n, v_n, lr_n, *outer, *inner, norm_eps),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                y, weight1, weight2 = whole(q_n, k_n, v_n, lr_n, *outer, *inner, norm_eps)
        else:
            outer = (token_scale[position : position + stop - start], ln_weight, ln_bias)
            open_weights = (weight1, weight2, gradient1, gradient2)
            y, gradient1, gradient2 = _part_of_mini_batch(
                q_n, k_n, v_n, lr_n, *outer, *open_weights, norm_eps
            )
            position += stop - start
            if position == mini_batch_tokens:
                weight1 = weight1 - token_scale[-1] * gradient1
                weight2 = weight2 - token_scale[-1] * gradient2
                gradient1, gradient2 = torch.zeros_like(gradient1), torch.zeros_like(gradient2)
                position = 0
        outputs.append(y)
    y = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    new = (weight1, weight2, gradient1, gradient2)
    return y, TTTMLPWeights(*(w.view(old.shape) for w, old in zip(new, state, strict=True)))
