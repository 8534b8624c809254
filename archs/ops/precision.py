"""The precision that sums are kept in."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype recurrent states are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
