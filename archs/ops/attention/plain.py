"""Attention as two dense products and a mask: what an operation counter sees in full."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    num_queries: int,
    num_keys: int,
    device: torch.device,
    *,
    window_tokens: int | None,
    num_sink_tokens: int,
) -> Tensor:
    """(C, S), True where the query may see the key."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    mask = keys <= queries
    if window_tokens is not None:
        mask = mask & ((keys > queries - window_tokens) | (keys < num_sink_tokens))
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, *, window_tokens: int | None, num_sink_tokens: int) -> Tensor:
    """See archs.ops.attention.attention."""
    num_groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(num_groups, dim=2), v.repeat_interleave(num_groups, dim=2)
    mask = visible(
        q.shape[1], k.shape[1], q.device, window_tokens=window_tokens, num_sink_tokens=num_sink_tokens
    )
    scores = torch.einsum("bchk,bshk->bhcs", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhcs,bshk->bchk", weights, v)


def attention_step(q: Tensor, k: Tensor, v: Tensor, num_seen: Tensor) -> Tensor:
    """See archs.ops.attention.attention_step. Scores all S keys."""
    grouped = q.unflatten(1, (k.shape[2], -1))
    scores = torch.einsum("bhgk,bshk->bhgs", grouped, k) * q.shape[-1] ** -0.5
    unseen = torch.arange(k.shape[1], device=q.device) >= num_seen
    weights = scores.masked_fill(unseen, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhgs,bshk->bhgk", weights, v).flatten(1, 2)
