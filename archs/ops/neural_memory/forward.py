"""Whole chunks one after the other where no gradient is asked for: the numbers of chunk.py, in place.

Names as in chunk.py. A layer's weights and momentum lie side by side, [M | S] of (n, in, 2 out), so that one
product meets both and one writes both; and keys and queries meet the first layer's weights together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops.neural_memory.chunk import Coefficients, Weights


def forward(
    q: Tensor, k: Tensor, v: Tensor, c: Coefficients, weights: Weights, updates: Weights
) -> tuple[Tensor, Weights, Weights]:
    """As `scan.scan`: tokens (m, n, b, K) and coefficients of m chunks -> y (m, n, b, K_v), weights,
    momentum. Its inputs stay as they are."""
    num_tokens = q.shape[2]
    joint = [torch.cat(pair, dim=-1) for pair in zip(weights, updates, strict=True)]
    halves = [both.chunk(2, dim=-1) for both in joint]
    keys_queries = torch.cat((k, q), dim=2)
    scores = c.mixing * (q @ k.mT)
    target = -2 * v
    last_mixing = torch.stack((c.last_mixing, c.last_momentum_mixing), dim=-2)  # (m, n, b, 2, 1)
    y = torch.empty_like(v)
    steps = (keys_queries, scores, target, last_mixing, c.alpha, c.beta, c.mixing)
    carries = (c.last_alpha, c.last_beta, c.last_p)
    chunks = zip(*(t.unbind(0) for t in (*steps, *carries, y)), strict=True)
    for kq, score, minus_2v, last, alpha, beta, mixing, last_alpha, last_beta, last_p, y_i in chunks:
        # The keys up, their deltas down.
        first = torch.bmm(kq, halves[0][0])
        z, inputs, before = first[:, :num_tokens], [kq[:, :num_tokens]], []
        for m, _ in halves[1:]:
            before.append(z)
            inputs.append(F.silu(z))
            z = torch.bmm(inputs[-1], m)
        deltas = [torch.add(minus_2v, z, alpha=2)]
        for (m, _), z in zip(halves[:0:-1], reversed(before), strict=True):
            deltas.insert(0, torch.ops.aten.silu_backward(torch.bmm(deltas[0], m.mT), z))
        # The queries up.
        x = kq[:, num_tokens:]
        over_m, over_s = first[:, num_tokens:], torch.bmm(x, halves[0][1])
        for layer, (a, d) in enumerate(zip(inputs, deltas, strict=True)):
            if layer:
                x = F.silu(x)
                over_m, over_s = torch.bmm(x, joint[layer]).chunk(2, dim=-1)
                score = torch.bmm(x, a.mT).mul_(mixing)
            x = torch.mul(over_m, alpha).addcmul_(over_s, beta)
            x = torch.baddbmm(x, score, d, out=x if layer + 1 < len(joint) else y_i)
        # What the chunk leaves behind.
        for a, d, both, (m, s) in zip(inputs, deltas, joint, halves, strict=True):
            m.mul_(last_alpha).addcmul_(s, last_beta)
            s.mul_(last_p)
            torch.baddbmm(both, a.mT, (d[:, :, None] * last).flatten(2), out=both)
    return y, *(tuple(w.contiguous() for w in part) for part in zip(*halves, strict=True))
