"""The LSTM mixer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.base import state_bytes
from archs.lstm import LSTM


def new_lstm(**settings: int) -> LSTM:
    torch.manual_seed(0)
    mixer = LSTM(d_model=6, **settings).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return mixer


def by_definition(mixer: LSTM, x: Tensor) -> Tensor:
    """The cell's equations, a token at a time; gates in torch's order."""
    lstm, width = mixer.lstm, mixer.hidden_width
    hidden, cell = x.new_zeros(x.shape[0], width), x.new_zeros(x.shape[0], width)
    outputs = []
    for token in x.unbind(1):
        pre = token @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + hidden @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        write, forget, content, read = pre.chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + write.sigmoid() * content.tanh()
        hidden = read.sigmoid() * cell.tanh()
        outputs.append(mixer.o_proj(hidden))
    return torch.stack(outputs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("hidden_width", [None, 10])
@pytest.mark.parametrize("sizes", [[65], [1, 63, 1], [64], []], ids=str)
def test_forward_chunks_and_steps_are_the_definition(hidden_width: int | None, sizes: list[int]) -> None:
    mixer = new_lstm(hidden_width=hidden_width)
    x = torch.randn(3, 65, 6, dtype=torch.float64)
    expected = by_definition(mixer, x)
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-9)
    state, outputs, position = mixer.init_state(3, 65), [], 0
    for size in sizes:
        y, state = mixer.prefill(x[:, position : position + size], state)
        outputs.append(y)
        position += size
    for token in x[:, position:].unbind(1):
        y, state = mixer.decode(token, state)
        outputs.append(y[:, None])
    assert state.num_tokens == 65
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_state_is_two_vectors_whatever_the_context(dtype: torch.dtype) -> None:
    mixer = LSTM(d_model=6, hidden_width=10).to(dtype)
    expected = 2 * 3 * 10 * (8 if dtype == torch.float64 else 4)
    state = mixer.init_state(3, 1000)
    assert state_bytes(state) == expected == mixer.state_bytes_at(3, 1) == mixer.state_bytes_at(3, 10**6)
    y, state = mixer.prefill(torch.randn(3, 5, 6, dtype=dtype), state)
    y, state = mixer.decode(y[:, -1], state)
    assert state_bytes(state) == expected and y.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("hidden_width", [6, 10])
def test_flops_are_those_of_the_cells(hidden_width: int) -> None:
    mixer = new_lstm(hidden_width=hidden_width)
    with FlopCounterMode(display=False) as counter:
        by_definition(mixer, torch.randn(1, 17, 6, dtype=torch.float64))
    assert counter.get_total_flops() == mixer.flops(17, "prefill").matmul
    with FlopCounterMode(display=False) as counter:
        mixer.decode(torch.randn(1, 6, dtype=torch.float64), mixer.init_state(1, 17))
    assert counter.get_total_flops() == mixer.flops(17, "decode").matmul


def test_the_forget_gate_starts_open() -> None:
    lstm = LSTM(d_model=4, forget_bias=1.5).lstm
    biases = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().chunk(4)
    assert [bias.unique().tolist() for bias in biases] == [[0.0], [1.5], [0.0], [0.0]]


def test_a_width_that_is_not_positive_is_an_error() -> None:
    with pytest.raises(ValueError, match="hidden_width=0"):
        LSTM(d_model=4, hidden_width=0)
