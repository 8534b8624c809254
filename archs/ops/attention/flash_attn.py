"""Attention through the flash-attn package (Dao 2023, arXiv 2307.08691); half precision on a GPU."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable


def attention(q: Tensor, k: Tensor, v: Tensor, *, window_tokens: int | None, num_sink_tokens: int) -> Tensor:
    """See archs.ops.attention.attention. Raises ImplementationUnavailable for float32, and for a
    window with tokens kept outside it, which the package has no call for."""
    _check_dtype(q)
    if window_tokens is not None and num_sink_tokens:
        raise ImplementationUnavailable(
            "implementation 'flash_attn' has no sliding window beside persistent tokens; use 'sdpa'."
        )
    window = (-1, -1) if window_tokens is None else (window_tokens - 1, 0)
    return flash_attn_func(q, k, v, causal=True, window_size=window)


def attention_step(q: Tensor, k: Tensor, v: Tensor, num_seen: Tensor) -> Tensor:
    """See archs.ops.attention.attention_step. Raises ImplementationUnavailable for float32."""
    _check_dtype(q)
    lengths = num_seen.to(torch.int32).expand(q.shape[0]).contiguous()
    return flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=lengths)[:, 0]


def _check_dtype(q: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ImplementationUnavailable(
            f"implementation 'flash_attn' takes bfloat16 or float16, not {q.dtype}; set dtype=bfloat16."
        )
