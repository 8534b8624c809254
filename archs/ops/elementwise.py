"""Elementwise operations that several operations and layers share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: From so many numbers on, passes over memory cost a CPU more than calls do.
MANY_NUMBERS = 2**17


GELU_SLOPE, GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


def is_bound_by_memory(x: Tensor) -> bool:
    """Return whether more calls with fewer passes over memory are quicker for x than one call of torch's.
    They are on a CPU, where x is large and autograd does not record."""
    is_unrecorded = x.device.type == "cpu" and not torch.is_grad_enabled()
    return is_unrecorded and x.dtype in (torch.float32, torch.float64) and x.numel() >= MANY_NUMBERS


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4),
    x (..., D), weight (D,)."""
    if not is_bound_by_memory(x):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # torch's own writes x^2 down
    scale = torch.addcmul(x.new_full((), eps), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    y = x * scale
    return y if weight is None else y.mul_(weight)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2)."""
    if not is_bound_by_memory(x):
        return F.gelu(x, approximate="tanh")
    return gelu_gate(x, x.new_full((), GELU_SLOPE)).mul_(x)


def gelu_gate(x: Tensor, slope: Tensor) -> Tensor:
    """gelu(x) / x = sigmoid(slope x (1 + GELU_CUBE x^2)), slope () holding GELU_SLOPE: the same function, but
    a CPU's sigmoid takes a third of its tanh's time."""
    return torch.addcmul(slope, x, x, value=GELU_CUBE * GELU_SLOPE).mul_(x).sigmoid_()
