"""One chunk of the neural memory, or a part of one, in plain matrix products.

Glossary, within one chunk of b tokens and one head (n rows of heads and sequences at once):
    a_j, d_j     a layer's input at key j and the loss' gradient at the layer's output, both at
                 the weights M' before the chunk: token j's gradient is the outer product a_j d_j'.
    M, S         weights and momentum where the call enters the chunk.
Unrolling the two recurrences gives scalars a chunk, the same for every layer, with
    S_i = p_i S + sum_j P_ij a_j d_j'            M_i = alpha_i M + beta_i S + sum_j C_ij a_j d_j'
so that a query x meets M_i as alpha_i x M + beta_i x S + sum_j C_ij (x . a_j) d_j': no gradient of
a single token is ever as large as the weights. P and C are sums of products of gates, without a
division: gates of exactly 0 or 1 are exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = tuple[Tensor, ...]


class Coefficients(NamedTuple):
    """alpha, beta (n, b, 1); mixing = C (n, b, b); last rows of C and P (n, b, 1); last of alpha,
    beta and p (n, 1, 1)."""

    alpha: Tensor
    beta: Tensor
    mixing: Tensor
    last_mixing: Tensor
    last_momentum_mixing: Tensor
    last_alpha: Tensor
    last_beta: Tensor
    last_p: Tensor


def coefficients_of(decay: Tensor, step_size: Tensor, momentum: Tensor) -> Coefficients:
    """Gates (..., b) -> coefficients, with the leading axes of the gates in front."""
    return Coefficients(*_Coefficients.apply(decay, step_size, momentum))


class _Coefficients(torch.autograd.Function):
    """Column 0 is what was there before the chunk, column 1 + j is token j; row i is after token i:
    decays[i, 1 + j] is the product of the keeps j + 1 to i, momenta of the momenta, and
    P = momenta * sources, C = decays[:, 1:] P.

    The gradient is by hand: automatic differentiation of a loop over the rows takes many small operations,
    and cumprod's own divides by its input."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, step_size: Tensor, momentum: Tensor) -> tuple[Tensor, ...]:
        products = _range_products(torch.stack((momentum, 1 - decay)))
        momenta, decays = products
        sources = torch.cat((torch.ones_like(step_size[..., :1]), -step_size), dim=-1)[..., None, :]
        p = momenta * sources
        c = decays[..., 1:] @ p
        ctx.save_for_backward(products, sources, p)
        alpha, beta, last_c, last_p = decays[..., :1], c[..., :1], c[..., -1, :, None], p[..., -1, :, None]
        return (
            alpha.contiguous(),
            beta.contiguous(),
            c[..., 1:].contiguous(),
            last_c[..., 1:, :].contiguous(),
            last_p[..., 1:, :].contiguous(),
            alpha[..., -1:, :].contiguous(),
            last_c[..., :1, :].contiguous(),
            last_p[..., :1, :].contiguous(),
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        products, sources, p = ctx.saved_tensors
        momenta, decays = products
        g = Coefficients(*gradients)
        with torch.autocast(p.device.type, enabled=False):
            g_c = torch.cat((g.beta, g.mixing), dim=-1)
            g_c[..., -1, :] += torch.cat((g.last_beta, g.last_mixing), dim=-2)[..., 0]
            g_p = decays[..., 1:].mT @ g_c
            g_p[..., -1, :] += torch.cat((g.last_p, g.last_momentum_mixing), dim=-2)[..., 0]
            g_decays = torch.cat((g.alpha, g_c @ p.mT), dim=-1)
            g_decays[..., -1:, :1] += g.last_alpha
            g_products = torch.stack((g_p * sources, g_decays))
            g_momentum, g_keep = _range_products_backward(products, g_products)
        return -g_keep, -(g_p * momenta)[..., 1:].sum(dim=-2), g_momentum


def _range_products(x: Tensor) -> Tensor:
    """(..., b) -> (..., b, b + 1): entry i, j is the product of x_j to x_i, 1 where j = i + 1 and 0 beyond;
    multiplied one by one, without a division."""
    num_tokens = x.shape[-1]
    first = torch.arange(num_tokens + 1, device=x.device)
    factors = torch.where(first[:num_tokens, None] >= first, x[..., None], 1)
    return factors.cumprod(dim=-2).tril_(1)


def _range_products_backward(products: Tensor, gradient: Tensor) -> Tensor:
    """x_t stands in the products of every i >= t and j <= t: those of t + 1 to i and of j to t - 1 are its
    derivative. (..., b, b + 1) twice -> (..., b)."""
    after = products[..., 1:].mT @ gradient
    before = torch.zeros_like(products)
    before[..., 1:, :] = products[..., :-1, :]
    before[..., 0, 0] = 1
    return (after * before).sum(dim=-1)


def gradients_of(k: Tensor, v: Tensor, start: Weights) -> tuple[list[Tensor], list[Tensor]]:
    """Every layer's inputs and output gradients at `start`: lists of (n, b, in), (n, b, out)."""
    inputs, slopes = [k], []
    for layer, w in enumerate(start):
        z = torch.bmm(inputs[-1], w)
        if layer + 1 < len(start):
            gate = z.sigmoid()
            x = z * gate
            inputs.append(x)
            slopes.append(torch.addcmul(gate, x, 1 - gate))  # silu'
    deltas = [2 * (z - v)]
    for w, slope in zip(start[:0:-1], reversed(slopes), strict=True):
        deltas.append(torch.bmm(deltas[-1], w.mT) * slope)
    return inputs, deltas[::-1]


def chunk(
    q: Tensor, k: Tensor, v: Tensor, c: Coefficients, start: Weights, weights: Weights, updates: Weights
) -> tuple[Tensor, Weights, Weights]:
    """The tokens (n, b, K) of a chunk, or of a part of it -> y (n, b, K_v), weights, momentum."""
    inputs, deltas = gradients_of(k, v, start)
    x, new_weights, new_updates = q, [], []
    for layer, (a, d, m, s) in enumerate(zip(inputs, deltas, weights, updates, strict=True)):
        if layer:
            x = x * x.sigmoid()
        scores = c.mixing * torch.bmm(x, a.mT)
        x = torch.baddbmm(torch.baddbmm(torch.bmm(c.alpha * x, m), c.beta * x, s), scores, d)
        carried = torch.addcmul(c.last_alpha * m, c.last_beta, s)
        new_weights.append(torch.baddbmm(carried, a.mT, c.last_mixing * d))
        new_updates.append(torch.baddbmm(c.last_p * s, a.mT, c.last_momentum_mixing * d))
    return x, tuple(new_weights), tuple(new_updates)


def single_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    start: Weights,
    weights: Weights,
    updates: Weights,
) -> tuple[Tensor, Weights, Weights]:
    """One token (n, 1, K): the recurrences as they stand, which read every matrix once."""
    decay, step_size, momentum = (g[..., None] for g in gates)
    inputs, deltas = gradients_of(k, v, start)
    updates = tuple(
        torch.baddbmm(momentum * s, a.mT, -step_size * d)
        for a, d, s in zip(inputs, deltas, updates, strict=True)
    )
    weights = tuple(torch.addcmul(s, 1 - decay, m) for m, s in zip(weights, updates, strict=True))
    x = q
    for layer, m in enumerate(weights):
        x = torch.bmm(x if layer == 0 else x * x.sigmoid(), m)
    return x, weights, updates
