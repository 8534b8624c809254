"""Attention as defined, one query at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, window_tokens: int | None, num_sink_tokens: int) -> Tensor:
    """See archs.ops.attention.attention."""
    num_queries, num_keys, num_groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(num_groups, dim=2), v.repeat_interleave(num_groups, dim=2)
    outputs = []
    for i in range(num_queries):
        position = num_keys - num_queries + i
        seen = list(range(min(num_sink_tokens, position + 1)))
        start = num_sink_tokens
        if window_tokens is not None:
            start = max(start, position - window_tokens + 1)
        seen += range(start, position + 1)
        scores = torch.einsum("bhk,bshk->bhs", q[:, i], k[:, seen]) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("bhs,bshk->bhk", scores.softmax(dim=-1), v[:, seen]))
    return torch.stack(outputs, dim=1)


def attention_step(q: Tensor, k: Tensor, v: Tensor, num_seen: Tensor) -> Tensor:
    """See archs.ops.attention.attention_step. It asks the device how many keys there are."""
    seen = int(num_seen)
    return attention(q[:, None], k[:, :seen], v[:, :seen], window_tokens=None, num_sink_tokens=0)[:, 0]
