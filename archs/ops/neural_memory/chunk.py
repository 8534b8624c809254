"""One chunk of the neural memory, or a part of one, in plain matrix products.

Glossary, within one chunk of b tokens and one head (n rows of heads and sequences at once):
    a_j, d_j     a layer's input at key j and the loss' gradient at the layer's output, both at
                 the weights M' before the chunk: token j's gradient is the outer product a_j d_j'.
    M, S         weights and momentum where the call enters the chunk.
Unrolling the two recurrences gives scalars a chunk, the same for every layer, with
    S_i = p_i S + sum_j P_ij a_j d_j'            M_i = alpha_i M + beta_i S + sum_j C_ij a_j d_j'
so that a query x meets M_i as alpha_i x M + beta_i x S + sum_j C_ij (x . a_j) d_j': no gradient of
a single token is ever as large as the weights. P and C follow from the recurrences themselves, row
by row, without a division: gates of exactly 0 or 1 are exact.
"""

from __future__ import annotations

from typing import NamedTuple

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
    num_tokens = decay.shape[-1]
    keep = 1 - decay
    # Columns: S, then the tokens of the chunk.
    row_p = torch.cat((torch.ones_like(decay[..., :1]), torch.zeros_like(decay)), dim=-1)
    row_c = torch.zeros_like(row_p)
    sources = torch.diag_embed(-step_size)
    alpha, rows = [], []
    for i in range(num_tokens):
        row_p = momentum[..., i, None] * row_p
        row_p = torch.cat((row_p[..., : i + 1], sources[..., i, i:]), dim=-1)
        row_c = keep[..., i, None] * row_c + row_p
        rows.append(row_c)
        alpha.append(keep[..., i] if i == 0 else keep[..., i] * alpha[-1])
    mixing, alpha = torch.stack(rows, dim=-2), torch.stack(alpha, dim=-1)
    return Coefficients(
        alpha=alpha[..., None],
        beta=mixing[..., :1],
        mixing=mixing[..., 1:].contiguous(),
        last_mixing=row_c[..., 1:, None],
        last_momentum_mixing=row_p[..., 1:, None],
        last_alpha=alpha[..., -1, None, None],
        last_beta=row_c[..., :1, None],
        last_p=row_p[..., :1, None],
    )


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
