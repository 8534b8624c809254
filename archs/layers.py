"""Building blocks that several architectures share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.ops.elementwise import rms_norm


def undecayed(values: Tensor) -> nn.Parameter:
    """Return a parameter that training leaves out of weight decay: a gain, bias or rate that has the shape of
    a matrix because heads have their own."""
    parameter = nn.Parameter(values)
    parameter.is_decayed = False  # type: ignore[attr-defined]
    return parameter


def initial_step_bias(count: int, steps: Sequence[float]) -> Tensor:
    """(count,): softplus of it is log-uniform in the range `steps`, two positive numbers
    (arXiv 2312.00752, section 3.6: the start of a step size's bias)."""
    low, high = (math.log(step) for step in steps)
    step = torch.exp(low + (high - low) * torch.rand(count))
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis of `width`, with a learned weight."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x, self.weight, eps=self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases unless asked (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, *, d_model: int, d_ff: int, use_bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=use_bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=use_bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate = F.silu(self.gate_proj(x), inplace=True)  # new memory would cost a CPU a tenth of the time
        return self.down_proj(gate.mul_(self.up_proj(x)))

    def flops_per_token(self) -> float:
        """6 D d_ff."""
        return 6.0 * self.gate_proj.weight.numel()


def rotary(x: Tensor, positions: Tensor, *, theta: float, is_interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34).

    x (..., T, H, K), positions (T,) -> as x. Dimension i is paired with i + K/2 (Llama), or, with
    `is_interleaved`, 2i with 2i + 1 (TTT).
    """
    table = rotary_table(positions, x.shape[-1], theta=theta, dtype=x.dtype)
    return rotate(x, table, is_interleaved=is_interleaved)


def rotary_table(positions: Tensor, width: int, *, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of `rotary`, (T, 1, width / 2) each, for what is rotated by the same
    positions."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
    angles = positions.to(torch.float64)[:, None] * theta**-exponents  # (T, K/2)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(x: Tensor, table: tuple[Tensor, Tensor], *, is_interleaved: bool = False) -> Tensor:
    """Rotate as `rotary`, by a table of `rotary_table`."""
    cos, sin = table
    if is_interleaved:
        # A pair as a complex number: one product, where the halves of pairs are slow to reach on a CPU.
        dtype = torch.promote_types(x.dtype, torch.float32)
        pairs = torch.view_as_complex(x.to(dtype).contiguous().unflatten(-1, (-1, 2)))
        turned = pairs * torch.complex(cos.to(dtype), sin.to(dtype))
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class CausalConvolution(nn.Module):
    """Depthwise causal convolution: y[t] = bias + sum_j weight[j] x[t - W + 1 + j], zeros before
    the start. Its state is the tail of the last W inputs, (B, D, W), oldest first."""

    def __init__(self, *, d_model: int, width: int = 4, use_bias: bool = True) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"convolution width={width} must be positive")
        self.width = width
        self.conv = nn.Conv1d(d_model, d_model, width, groups=d_model, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self._convolve(F.pad(x, (0, 0, self.width - 1, 0)))

    def _convolve(self, window: Tensor) -> Tensor:
        """(B, T + W - 1, D) -> (B, T, D). As a convolution of images of height 1 with the channels
        last, which on a CPU is several times as fast as conv1d with the channels first."""
        image = window.transpose(1, 2)[:, :, None]
        weight = self.conv.weight[:, :, None]
        y = F.conv2d(image, weight, self.conv.bias, groups=weight.shape[0])
        return y[:, :, 0].transpose(1, 2)

    def init_tail(self, batch_size: int) -> Tensor:
        """Return zeros (B, D, W)."""
        weight = self.conv.weight
        return weight.new_zeros(batch_size, weight.shape[0], self.width)

    def prefill(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, D) and the tail -> (B, C, D) and the tail, updated in place."""
        window = torch.cat((tail.transpose(1, 2), x), dim=1)
        tail.copy_(window[:, -self.width :].transpose(1, 2))
        return self._convolve(window[:, 1:]), tail

    def decode(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) and the tail -> (B, D) and the tail, updated in place."""
        tail.copy_(torch.cat((tail[..., 1:], x[..., None]), dim=2))
        y = torch.einsum("bdw,dw->bd", tail, self.conv.weight[:, 0])
        return (y if self.conv.bias is None else y + self.conv.bias), tail

    def tail_bytes(self, batch_size: int) -> int:
        """Return the bytes of the tail: B D W elements of the parameters' dtype."""
        weight = self.conv.weight
        return batch_size * weight.shape[0] * self.width * weight.element_size()

    def flops_per_token(self) -> float:
        """2 W D."""
        return 2.0 * self.conv.weight.numel()


class ConvolutionState(NamedTuple):
    """tail (B, D, W)."""

    tail: Tensor
    num_tokens: int


class ShortConvolution(Mixer):
    """A causal convolution as a mixer of its own: TTT's `pre_conv` (arXiv 2407.04620, section 2.7:
    the Mamba backbone)."""

    def __init__(self, *, d_model: int, width: int = 4, use_bias: bool = True) -> None:
        super().__init__()
        self.conv = CausalConvolution(d_model=d_model, width=width, use_bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def init_state(self, batch_size: int, max_context_tokens: int) -> ConvolutionState:
        del max_context_tokens
        return ConvolutionState(self.conv.init_tail(batch_size), 0)

    def prefill(self, x: Tensor, state: ConvolutionState) -> tuple[Tensor, ConvolutionState]:
        y, tail = self.conv.prefill(x, state.tail)
        return y, ConvolutionState(tail, state.num_tokens + x.shape[1])

    def decode(self, x: Tensor, state: ConvolutionState) -> tuple[Tensor, ConvolutionState]:
        y, tail = self.conv.decode(x, state.tail)
        return y, ConvolutionState(tail, state.num_tokens + 1)

    def step_kind(self, num_tokens: int) -> int:
        """Return 0: every step does the same work."""
        del num_tokens
        return 0

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        del context_tokens
        return self.conv.tail_bytes(batch_size)

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        num_tokens = context_tokens if phase == "prefill" else 1
        return Flops(matmul=num_tokens * self.conv.flops_per_token())
