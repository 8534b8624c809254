"""Whole chunks one after the other, with the backward pass written out.

Automatic differentiation would keep every intermediate of every chunk and reduce full matrices for
the gradients of scalars. Here a chunk keeps the weights and momentum it began with, and recomputes
the rest. Names as in chunk.py; g_ before a name is the gradient of the outer loss with respect to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archs.ops.neural_memory.chunk import Coefficients, Weights, chunk


def scan(
    q: Tensor, k: Tensor, v: Tensor, coefficients: Coefficients, weights: Weights, updates: Weights
) -> tuple[Tensor, Weights, Weights]:
    """Tokens (m, n, b, K) and coefficients of m chunks -> y (m, n, b, K_v), weights, momentum."""
    y, *new = _Scan.apply(len(weights), q, k, v, *coefficients, *weights, *updates)
    return y, tuple(new[: len(weights)]), tuple(new[len(weights) :])


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, depth: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        sequences, carried = tensors[:11], tensors[11:]
        weights, updates = carried[:depth], carried[depth:]
        outputs, starts = [], []
        for q, k, v, *some in zip(*(t.unbind(0) for t in sequences), strict=True):
            starts += (*weights, *updates)
            y, weights, updates = chunk(q, k, v, Coefficients(*some), weights, weights, updates)
            outputs.append(y)
        ctx.depth = depth
        ctx.save_for_backward(*sequences, *starts)
        return torch.stack(outputs), *weights, *updates

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_y: Tensor, *g_carried: Tensor) -> tuple[Tensor | None, ...]:
        depth, saved = ctx.depth, ctx.saved_tensors
        sequences, starts = saved[:11], saved[11:]
        g_weights, g_updates = list(g_carried[:depth]), list(g_carried[depth:])
        g_sequences = []
        for i in reversed(range(g_y.shape[0])):
            q, k, v, *some = (t[i] for t in sequences)
            start = starts[2 * depth * i : 2 * depth * (i + 1)]
            with torch.autocast(g_y.device.type, enabled=False):
                gradients, g_weights, g_updates = _chunk_backward(
                    q, k, v, Coefficients(*some), start[:depth], start[depth:], g_y[i], g_weights, g_updates
                )
            g_sequences.append(gradients)
        stacked = (torch.stack(g) for g in zip(*reversed(g_sequences), strict=True))
        return None, *stacked, *g_weights, *g_updates


def _silu_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """silu(z) and its first derivative."""
    gate = z.sigmoid()
    x = z * gate
    return x, torch.addcmul(gate, x, 1 - gate)


def _row_sum(x: Tensor, y: Tensor) -> Tensor:
    """(n, b, width) twice -> (n, b, 1)."""
    return (x * y).sum(dim=-1, keepdim=True)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Matrices (n, in, out) twice -> their inner products (n, 1, 1)."""
    return torch.bmm(x.reshape(x.shape[0], 1, -1), y.reshape(y.shape[0], -1, 1))


def _chunk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Coefficients,
    weights: Weights,
    updates: Weights,
    g_y: Tensor,
    g_weights: list[Tensor],
    g_updates: list[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """Gradients of chunk() with start = weights: those of q, k, v and the coefficients, those of
    the weights, those of the momentum."""
    depth = len(weights)
    # The forward pass once more: keys up, their deltas down, queries up.
    inputs, slopes, curvatures = [k], [], []
    for w in weights[:-1]:
        z = torch.bmm(inputs[-1], w)
        gate = z.sigmoid()
        x, rest = z * gate, 1 - gate
        inputs.append(x)
        slopes.append(torch.addcmul(gate, x, rest))
        curvatures.append(rest * torch.addcmul(2 * gate, x, rest - gate))  # silu''
    deltas, unsloped = [2 * (torch.bmm(inputs[-1], weights[-1]) - v)], []
    for w, slope in zip(weights[:0:-1], reversed(slopes), strict=True):
        unsloped.insert(0, torch.bmm(deltas[0], w.mT))
        deltas.insert(0, unsloped[0] * slope)
    queries, query_slopes, products = [q], [], []
    for layer in range(depth):
        x, m, s = queries[-1], weights[layer], updates[layer]
        products.append(torch.bmm(x, inputs[layer].mT))
        if layer + 1 < depth:
            z = torch.baddbmm(torch.bmm(c.alpha * x, m), c.beta * x, s)
            z = torch.baddbmm(z, c.mixing * products[-1], deltas[layer])
            x, slope = _silu_slope(z)
            queries.append(x)
            query_slopes.append(slope)

    # Through the new weights and momentum.
    g = {name: 0 for name in Coefficients._fields}
    g_m, g_s, g_inputs, g_deltas = [], [], [], []
    for a, d, m, s, g_w, g_u in zip(inputs, deltas, weights, updates, g_weights, g_updates, strict=True):
        along_w, along_u = torch.bmm(a, g_w), torch.bmm(a, g_u)
        g["last_mixing"] += _row_sum(d, along_w)
        g["last_momentum_mixing"] += _row_sum(d, along_u)
        g["last_alpha"] += _dot(g_w, m)
        g["last_beta"] += _dot(g_w, s)
        g["last_p"] += _dot(g_u, s)
        g_deltas.append(torch.addcmul(c.last_mixing * along_w, c.last_momentum_mixing, along_u))
        g_input = torch.bmm(c.last_mixing * d, g_w.mT)
        g_inputs.append(g_input.baddbmm_(c.last_momentum_mixing * d, g_u.mT))
        g_m.append(c.last_alpha * g_w)
        g_s.append(torch.addcmul(c.last_beta * g_w, c.last_p, g_u))

    # Through the queries, from the last layer down.
    g_x = g_y
    for layer in reversed(range(depth)):
        a, d, x = inputs[layer], deltas[layer], queries[layer]
        if layer + 1 < depth:
            g_x = g_x * query_slopes[layer]
        g_out = g_x
        over_m, over_s = torch.bmm(g_out, weights[layer].mT), torch.bmm(g_out, updates[layer].mT)
        g["alpha"] += _row_sum(x, over_m)
        g["beta"] += _row_sum(x, over_s)
        g_m[layer].baddbmm_((c.alpha * x).mT, g_out)
        g_s[layer].baddbmm_((c.beta * x).mT, g_out)
        g_scores = torch.bmm(g_out, d.mT)
        g_deltas[layer].baddbmm_((c.mixing * products[layer]).mT, g_out)
        g["mixing"] += g_scores * products[layer]
        g_products = g_scores * c.mixing
        g_inputs[layer].baddbmm_(g_products.mT, x)
        g_x = torch.addcmul(c.alpha * over_m, c.beta, over_s).baddbmm_(g_products, a)

    # Through the keys' gradients: deltas up, then layer inputs down.
    g_z = []
    for layer in range(depth - 1):
        g_z.append(g_deltas[layer] * unsloped[layer] * curvatures[layer])
        g_unsloped = g_deltas[layer] * slopes[layer]
        g_deltas[layer + 1].baddbmm_(g_unsloped, weights[layer + 1])
        g_m[layer + 1].baddbmm_(g_unsloped.mT, deltas[layer + 1])
    g_z.append(2 * g_deltas[-1])
    for layer in reversed(range(depth)):
        g_m[layer].baddbmm_(inputs[layer].mT, g_z[layer])
        g_inputs[layer].baddbmm_(g_z[layer], weights[layer].mT)
        if layer:
            g_z[layer - 1].addcmul_(g_inputs[layer], slopes[layer - 1])
    return (g_x, g_inputs[0], -g_z[-1], *(g[name] for name in Coefficients._fields)), g_m, g_s
