"""TTT-Linear in the dual form (arXiv 2407.04620, section 2.5 and appendix A): matrix products only.

What the state does not wait for is computed for many mini-batches at once; only the inner gradients
and the weights follow one another. With the paper's letters:

    n    mini-batch; M = B H independent heads; b tokens a mini-batch; f = K
    X~   tokens with a one appended, so that W's last row is the bias
    Z    k~ W, the inner model before its LayerNorm
    h    lr * dl/dZ, rows of the mini-batch's gradients
    S    S[i, j] = token_scale_i for j <= i, else 0
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops.ttt_linear import TTTLinearWeights

# Mini-batches whose weights-independent work is batched; 16 of them keep a head's weights in cache.
# Without gradients, that work's many small calls cost more than the cache: so many times as many.
GROUP_MINI_BATCHES = 16
READING_GROUPS = 4


class Tokens(NamedTuple):
    """A run of N mini-batches: q, k with ones (N, M, c, K + 1); the loss gradient at the LayerNorm's
    output is offset + slope * normalised, both (N, M, c, K)."""

    q: Tensor
    k: Tensor
    offset: Tensor
    slope: Tensor


def by_mini_batch(x: Tensor, num_tokens: int) -> Tensor:
    """(B, N c, H, ...) -> (N, B H, c, ...) for mini-batches of c = num_tokens."""
    x = x.unflatten(1, (-1, num_tokens)).transpose(0, 1).transpose(2, 3)
    return x.flatten(1, 2)


def arrange(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    num_tokens: int,
) -> Tokens:
    """Lays q, k, v (B, N c, H, K) out for the scan, and folds lr (B, N c, H) and the inner
    LayerNorm's parameters (H, K) into the two coefficients that the gradient needs:
    lr * ln_weight * (ln_weight * normalised + ln_bias - (v - k))."""
    scaled = lr[..., None] * ln_weight
    offset, slope = scaled * (ln_bias - v + k), scaled * ln_weight
    with_ones = (F.pad(by_mini_batch(x, num_tokens), (0, 1), value=1.0) for x in (q, k))
    return Tokens(*with_ones, *(by_mini_batch(x, num_tokens).contiguous() for x in (offset, slope)))


def loss_gradient(z: Tensor, offset: Tensor, slope: Tensor, norm_eps: float) -> Tensor:
    """lr * dl/dZ for l = 1/2 |LN(Z) - (v - k)|^2; all (..., K)."""
    width = z.shape[-1:]
    normalised, mean, rstd = torch.native_layer_norm(z, width, None, None, norm_eps)
    outer = torch.addcmul(offset, slope, normalised)
    return torch.ops.aten.native_layer_norm_backward(
        outer, z, width, mean, rstd, None, None, [True, False, False]
    )[0]


class LossGradientBackward:
    """The derivative of `loss_gradient`, for N mini-batches prepared at once and applied one by one.

    With x the normalised z, r = 1 / std, P(a) = a - mean(a) - x mean(a x), outer = offset + slope x:
    h = r P(outer), and both z -> x and r depend on z.
    """

    def __init__(self, z: Tensor, offset: Tensor, slope: Tensor, h: Tensor, norm_eps: float) -> None:
        self.z, self.slope, self.width = z, slope, z.shape[-1:]
        self.x, self.mean, self.rstd = torch.native_layer_norm(z, self.width, None, None, norm_eps)
        outer = torch.addcmul(offset, slope, self.x)
        self.outer_r = outer * self.rstd
        self.mean_r = (outer * self.x).mean(dim=-1, keepdim=True) * self.rstd
        self.x_mean = self.x / z.shape[-1]
        self.h_mean_rx = h / z.shape[-1]
        self.rx = self.rstd * self.x
        self.d_offset = torch.empty_like(z)

    def _project(self, n: int, a: Tensor) -> Tensor:
        """r P(a)."""
        return torch.ops.aten.native_layer_norm_backward(
            a, self.z[n], self.width, self.mean[n], self.rstd[n], None, None, [True, False, False]
        )[0]

    def step(self, n: int, d_h: Tensor) -> Tensor:
        """d h of mini-batch n -> d z; keeps d offset."""
        d_outer = self._project(n, d_h)
        self.d_offset[n] = d_outer
        d_x = torch.mul(self.slope[n], d_outer)
        d_x.addcmul_(self.mean_r[n], d_h, value=-1)
        d_x.addcmul_(self.outer_r[n], (d_h * self.x_mean[n]).sum(-1, keepdim=True), value=-1)
        d_z = self._project(n, d_x)
        return d_z.addcmul_(self.rx[n], (d_h * self.h_mean_rx[n]).sum(-1, keepdim=True), value=-1)

    def d_slope(self) -> Tensor:
        """d slope of all mini-batches, once each has been stepped."""
        return self.d_offset * self.x


def without_autocast(backward: Callable) -> Callable[..., Any]:
    """A backward pass in its tensors' own dtype, also where it is called under autocast."""

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return backward(ctx, *gradients)

    return wrapped


class InnerScan(torch.autograd.Function):
    """The serial part. k~ (N, M, b, f + 1), update = token_scale_last k~, offset and slope
    (N, M, b, f), W (M, f + 1, f) -> h (N, M, b, f), the weights before each mini-batch
    (N, M, f + 1, f) and those after the last. Its backward is written by hand, because the graph of
    many small operations costs several times the arithmetic."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, update: Tensor, offset: Tensor, slope: Tensor, weight: Tensor, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_mini_batches = k.shape[0]
        weights = weight.new_empty(num_mini_batches, *weight.shape)
        weights[0] = weight
        weight_after, is_read_again = torch.empty_like(weight), any(ctx.needs_input_grad)
        after, all_z, all_h = [*weights.unbind()[1:], weight_after], [], []
        steps = zip(k, update.mT, offset, slope, weights, after, strict=True)
        for k_n, update_n, offset_n, slope_n, weight_n, after_n in steps:
            z_n = torch.bmm(k_n, weight_n)
            h_n = loss_gradient(z_n, offset_n, slope_n, norm_eps)
            torch.baddbmm(weight_n, update_n, h_n, alpha=-1, out=after_n)
            all_h.append(h_n)
            if is_read_again:
                all_z.append(z_n)
        h, z = torch.stack(all_h), torch.stack(all_z) if is_read_again else None
        ctx.save_for_backward(k, update, offset, slope, h, z, weights)
        ctx.norm_eps = norm_eps
        return h, weights, weight_after

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor, d_weights: Tensor, d_weight: Tensor) -> tuple[Tensor | None, ...]:
        k, update, offset, slope, h, z, weights = ctx.saved_tensors
        inner = LossGradientBackward(z, offset, slope, h, ctx.norm_eps)
        d_z, d_update = torch.empty_like(z), torch.empty_like(update)
        for n in reversed(range(k.shape[0])):
            torch.bmm(h[n], d_weight.mT, out=d_update[n])
            d_z[n] = inner.step(n, torch.baddbmm(d_h[n], update[n], d_weight, alpha=-1))
            d_weight = torch.baddbmm(d_weight + d_weights[n], k[n].mT, d_z[n])
        d_k = d_z @ weights.mT
        return d_k, d_update.neg_(), inner.d_offset, inner.d_slope(), d_weight, None


def output(z: Tensor, q: Tensor, ln_weight: Tensor, ln_bias: Tensor, norm_eps: float) -> Tensor:
    """q + LN(z): z (N, B H, c, K), q (B, N c, H, K) -> as q."""
    batch_size = q.shape[0]
    z = F.layer_norm(z, z.shape[-1:], eps=norm_eps).unflatten(1, (batch_size, -1))
    z = z.permute(1, 0, 3, 2, 4).flatten(1, 2)  # (B, N c, H, K)
    return q + torch.addcmul(ln_bias, z, ln_weight)


def segments(num_tokens: int, position: int, mini_batch_tokens: int) -> list[tuple[int, int]]:
    """Cuts a call into [start, stop): what fills the open mini-batch, groups of whole mini-batches,
    and what opens the last one."""
    first = min(num_tokens, -position % mini_batch_tokens)
    whole = first + (num_tokens - first) // mini_batch_tokens * mini_batch_tokens
    group = GROUP_MINI_BATCHES * mini_batch_tokens * (1 if torch.is_grad_enabled() else READING_GROUPS)
    cuts = sorted({0, *range(first, whole, group), whole, num_tokens})
    return list(pairwise(cuts))


def _whole_mini_batches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N b, H, K) from the start of a mini-batch; weight (B H, K + 1, K)."""
    tokens = arrange(q, k, v, lr, ln_weight, ln_bias, token_scale.shape[0])
    update = tokens.k * token_scale[-1]
    h, weights, weight = InnerScan.apply(tokens.k, update, tokens.offset, tokens.slope, weight, norm_eps)
    mask = token_scale[:, None].expand(-1, token_scale.shape[0]).tril()
    attention = (tokens.q @ tokens.k.mT).mul_(mask)
    flat = (t.flatten(0, 1) for t in (tokens.q @ weights, attention, h))
    z = torch.baddbmm(*flat, alpha=-1).view_as(h)
    return output(z, q, ln_weight, ln_bias, norm_eps), weight


def _part_of_mini_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    gradient: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """c tokens of one mini-batch with their token_scale (c,); weight and gradient (B H, K + 1, K).
    Returns y and the gradient."""
    num_tokens = q.shape[1]
    tokens = Tokens(*(x[0] for x in arrange(q, k, v, lr, ln_weight, ln_bias, num_tokens)))
    h = loss_gradient(tokens.k @ weight, tokens.offset, tokens.slope, norm_eps)
    attention = (tokens.q @ tokens.k.mT).tril()
    z = tokens.q @ weight - token_scale[:, None] * (tokens.q @ gradient + attention @ h)
    gradient = torch.baddbmm(gradient, tokens.k.mT, h)
    return output(z[None], q, ln_weight, ln_bias, norm_eps), gradient


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
    mini_batch_tokens, shape = token_scale.shape[0], state.weight.shape
    weight, gradient = (w.flatten(0, 1) for w in state)
    outputs = []
    for start, stop in segments(q.shape[1], position, mini_batch_tokens):
        q_n, k_n, v_n, lr_n = (x[:, start:stop] for x in (q, k, v, lr))
        if position == 0 and (stop - start) % mini_batch_tokens == 0:
            y, weight = _whole_mini_batches(
                q_n, k_n, v_n, lr_n, token_scale, ln_weight, ln_bias, weight, norm_eps
            )
        else:
            scale = token_scale[position : position + stop - start]
            y, gradient = _part_of_mini_batch(
                q_n, k_n, v_n, lr_n, scale, ln_weight, ln_bias, weight, gradient, norm_eps
            )
            position += stop - start
            if position == mini_batch_tokens:
                weight = weight - token_scale[-1] * gradient
                gradient, position = torch.zeros_like(gradient), 0
        outputs.append(y)
    y = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    return y, TTTLinearWeights(weight.view(shape), gradient.view(shape))
