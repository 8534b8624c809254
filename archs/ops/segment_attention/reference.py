"""Attention over named keys as defined, one query at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """See archs.ops.segment_attention.segment_attention."""
    outputs = []
    for i in range(q.shape[1]):
        keys, values = (k, v) if seen is None else (k[:, seen[i]], v[:, seen[i]])
        scores = torch.einsum("bhk,bshk->bhs", q[:, i], keys) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("bhs,bshk->bhk", scores.softmax(dim=-1), values))
    return torch.stack(outputs, dim=1)
