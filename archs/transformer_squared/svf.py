"""Singular value fine-tuning of a matrix: its factors stay, its singular values are scaled
(Transformer², Sun et al. 2025, arXiv 2501.06252, section 3.1).

W (m, n) = u (m, r) diag(s (r,)) vh (r, n) with r = min(m, n); `gain` (..., r) multiplies s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.layers import SwiGLU


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight (m, n) -> u, s, vh in its dtype, computed in float64.

    The largest entry of every column of u is made positive: the decomposition leaves its sign open.
    """
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    largest = u.abs().argmax(dim=0, keepdim=True)
    signs = u.gather(0, largest).sign()
    u, vh = u * signs, vh * signs.T
    return u.to(weight.dtype), s.to(weight.dtype), vh.to(weight.dtype)


def compose(u: Tensor, s: Tensor, vh: Tensor, gain: Tensor) -> Tensor:
    """u diag(s gain) vh, (..., m, n)."""
    return (u * (s * gain).unsqueeze(-2)) @ vh


def keep_sum(multiplier: Tensor, s: Tensor) -> Tensor:
    """multiplier (..., r) -> gain (..., r): scaled so that the singular values keep their sum, as
    the paper's public code does."""
    return multiplier * (s.sum() / (s * multiplier).sum(dim=-1, keepdim=True))


class SingularLinear(nn.Module):
    """x -> x W' + bias, W' = compose(u, s, vh, gain), without ever building W': rows of a batch may
    have different gains. `linear` may have a bias, which is kept as it is."""

    u: Tensor
    s: Tensor
    vh: Tensor
    bias: Tensor | None

    def __init__(self, *, linear: nn.Linear) -> None:
        super().__init__()
        for name, factor in zip(("u", "s", "vh"), decompose(linear.weight), strict=True):
            self.register_buffer(name, factor)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def load_matrix(self, weight: Tensor) -> None:
        """Take the factors of another matrix (m, n); raises ValueError where the shape differs."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the base's matrix has shape {tuple(weight.shape)} instead of {self.shape}")
        for buffer, factor in zip((self.u, self.s, self.vh), decompose(weight), strict=True):
            buffer.copy_(factor)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix that the factors stand for."""
        return self.u.shape[0], self.vh.shape[1]

    @property
    def num_entries(self) -> int:
        """Return the weights of the matrix and its bias: m n, or m n + m."""
        return self.u.shape[0] * self.vh.shape[1] + (0 if self.bias is None else self.bias.numel())

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        """x (B, n) or (B, C, n), gain (B, r) -> (B, m) or (B, C, m)."""
        scale = (self.s * gain).to(x.dtype)
        scaled = F.linear(x, self.vh) * (scale if x.dim() == 2 else scale[:, None])
        return F.linear(scaled, self.u, self.bias)

    def flops_per_token(self) -> float:
        """2 (m + n) r."""
        return 2.0 * (self.u.numel() + self.vh.numel())


class SingularSwiGLU(nn.Module):
    """`archs.layers.SwiGLU` with its three matrices decomposed."""

    def __init__(self, *, feed_forward: SwiGLU) -> None:
        super().__init__()
        self.gate_proj = SingularLinear(linear=feed_forward.gate_proj)
        self.up_proj = SingularLinear(linear=feed_forward.up_proj)
        self.down_proj = SingularLinear(linear=feed_forward.down_proj)

    @property
    def matrices(self) -> tuple[SingularLinear, SingularLinear, SingularLinear]:
        """In the order in which `forward` takes their gains."""
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x: Tensor, gains: tuple[Tensor, ...]) -> Tensor:
        """x (B, D) or (B, C, D) and a gain (B, r) for each of the matrices -> as x."""
        gate, up, down = gains
        return self.down_proj(F.silu(self.gate_proj(x, gate)) * self.up_proj(x, up), down)
