"""The long short-term memory: the recurrent baseline the other constant-state models descend from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.ops.precision import accumulation_dtype


class LSTMState(NamedTuple):
    """hidden, cell (B, hidden_width)."""

    hidden: Tensor
    cell: Tensor
    num_tokens: int


class LSTM(Mixer):
    """One layer of torch's nn.LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers
    et al. 2000).

    It has no form that is parallel over time: training and prefill walk through the tokens.
    hidden_width: width of the hidden and the cell state, default d_model; another width needs a
                  projection back, which this one does without.
    forget_bias:  start value of the forget gate's bias; 1 keeps the cell from forgetting everything
                  within a few tokens at the start of training (Jozefowicz et al. 2015).
    Raises ValueError where a width is not positive.
    """

    def __init__(self, *, d_model: int, hidden_width: int | None = None, forget_bias: float = 1.0) -> None:
        super().__init__()
        hidden_width = d_model if hidden_width is None else hidden_width
        for name, value in (("d_model", d_model), ("hidden_width", hidden_width)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        self.hidden_width = hidden_width
        self.lstm = nn.LSTM(d_model, hidden_width, batch_first=True)
        needs_projection = hidden_width != d_model
        self.o_proj = nn.Linear(hidden_width, d_model, bias=False) if needs_projection else nn.Identity()
        with torch.no_grad():  # the gates' order in torch: input, forget, cell, output
            self.lstm.bias_hh_l0.zero_()
            self.lstm.bias_ih_l0.zero_()
            self.lstm.bias_ih_l0[hidden_width : 2 * hidden_width] = forget_bias

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.lstm(x)[0])

    def init_state(self, batch_size: int, max_context_tokens: int) -> LSTMState:
        del max_context_tokens
        weight = self.lstm.weight_hh_l0
        shape, dtype = (batch_size, self.hidden_width), accumulation_dtype(weight.dtype)
        return LSTMState(weight.new_zeros(shape, dtype=dtype), weight.new_zeros(shape, dtype=dtype), 0)

    def prefill(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        hidden, cell = state.hidden.to(x.dtype)[None], state.cell.to(x.dtype)[None]
        y, (hidden, cell) = self.lstm(x, (hidden, cell))
        return self.o_proj(y), self._advance(state, hidden[0], cell[0], x.shape[1])

    def decode(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        weights = (
            self.lstm.weight_ih_l0,
            self.lstm.weight_hh_l0,
            self.lstm.bias_ih_l0,
            self.lstm.bias_hh_l0,
        )
        hidden, cell = torch.lstm_cell(x, (state.hidden.to(x.dtype), state.cell.to(x.dtype)), *weights)
        return self.o_proj(hidden), self._advance(state, hidden, cell, 1)

    def _advance(self, state: LSTMState, hidden: Tensor, cell: Tensor, num_tokens: int) -> LSTMState:
        dtype = state.cell.dtype
        return LSTMState(hidden.to(dtype), cell.to(dtype), state.num_tokens + num_tokens)

    def step_kind(self, num_tokens: int) -> int:
        """Return 0: every step does the same work."""
        del num_tokens
        return 0

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        del context_tokens
        dtype = accumulation_dtype(self.lstm.weight_hh_l0.dtype)
        return 2 * batch_size * self.hidden_width * dtype.itemsize

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count per token: 8 (D + M) M for the gates, M the hidden width, and 2 D M for the projection if
        there is one. Scan rule: 9 M elementwise (five nonlinearities, three products, one sum)."""
        num_tokens = context_tokens if phase == "prefill" else 1
        matrices = [self.lstm.weight_ih_l0, self.lstm.weight_hh_l0, *self.o_proj.parameters()]
        return Flops(
            matmul=num_tokens * 2.0 * sum(matrix.numel() for matrix in matrices),
            scan=num_tokens * 9.0 * self.hidden_width,
        )
