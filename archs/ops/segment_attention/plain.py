"""Attention over named keys as two dense products and a mask."""

from __future__ import annotations

from torch import Tensor


def segment_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """See archs.ops.segment_attention.segment_attention."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)
