"""A running mean of the past, as small as a mixer can be."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase, check_state_request
from archs.ops.precision import accumulation_dtype


class AverageState(NamedTuple):
    """total (B, D): the sum of the projected tokens so far."""

    total: Tensor
    num_tokens: int


class RunningAverage(Mixer):
    """y_t = W (x_1 + ... + x_t) / t. If `is_poisoned`, all outputs are NaN."""

    def __init__(self, *, d_model: int, is_poisoned: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, d_model, bias=False)
        self.is_poisoned = is_poisoned

    def forward(self, x: Tensor) -> Tensor:
        return self.prefill(x, self.init_state(x.shape[0], x.shape[1]))[0]

    def init_state(self, batch_size: int, max_context_tokens: int) -> AverageState:
        check_state_request(batch_size, max_context_tokens)
        weight = self.proj.weight
        total = weight.new_zeros(batch_size, weight.shape[0], dtype=accumulation_dtype(weight.dtype))
        return AverageState(total, 0)

    def prefill(self, x: Tensor, state: AverageState) -> tuple[Tensor, AverageState]:
        totals = state.total[:, None] + self.proj(x).to(state.total.dtype).cumsum(1)
        counts = torch.arange(1, x.shape[1] + 1, device=x.device) + state.num_tokens
        y = (totals / counts[:, None]).to(x.dtype) + (math.nan if self.is_poisoned else 0.0)
        return y, AverageState(totals[:, -1], state.num_tokens + x.shape[1])

    def decode(self, x: Tensor, state: AverageState) -> tuple[Tensor, AverageState]:
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        weight = self.proj.weight
        return batch_size * weight.shape[0] * accumulation_dtype(weight.dtype).itemsize

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        width = self.proj.weight.shape[0]
        num_tokens = context_tokens if phase == "prefill" else 1
        return Flops(matmul=2 * num_tokens * width**2, scan=2 * num_tokens * width)
