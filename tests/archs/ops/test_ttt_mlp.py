"""TTT-MLP's operation: the dual form against the definition, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from archs.ops.ttt_mlp import TTTMLPWeights, ttt_mlp

NUM_INPUTS = 7  # before the state


def tensors(num_tokens: int, *, position: int = 0, mini_batch_tokens: int = 16) -> list[Tensor]:
    """q, k, v, lr, token_scale, ln_weight, ln_bias, both weights and open gradients, in float64."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, heads, width = 2, 2, 4
    shapes = [(batch, heads, width + 1, 4 * width), (batch, heads, 4 * width + 1, width)]
    inputs = [
        *(normal(batch, num_tokens, heads, width) for _ in range(3)),
        normal(batch, num_tokens, heads).sigmoid() / width,
        1 / torch.arange(1, mini_batch_tokens + 1) + 0.1 * normal(mini_batch_tokens),
        1 + 0.2 * normal(heads, width),
        0.2 * normal(heads, width),
        *(0.5 * normal(*shape) for shape in shapes),
        *(0.1 * normal(*shape) * bool(position) for shape in shapes),
    ]
    return [t.requires_grad_() for t in inputs]


def call(inputs: list[Tensor], position: int, implementation: str) -> tuple[Tensor, TTTMLPWeights]:
    state = TTTMLPWeights(*inputs[NUM_INPUTS:])
    return ttt_mlp(*inputs[:NUM_INPUTS], state, position, implementation=implementation)


def gradients(inputs: list[Tensor], position: int, implementation: str) -> tuple[Tensor, ...]:
    """Of a function of the outputs and all parts of the state."""
    y, state = call(inputs, position, implementation)
    total = y.sin().sum()
    for part in state:
        total = total + part.cos().sum() + part.square().sum()
    wanted = inputs if position else inputs[:-2]  # an empty mini-batch has no open gradient
    return torch.autograd.grad(total, wanted)


def test_half_precision_tokens_are_computed_in_the_states_dtype() -> None:
    inputs = [t.detach() for t in tensors(20)]
    state = TTTMLPWeights(*(t.float() for t in inputs[NUM_INPUTS:]))
    halves = [t.bfloat16() for t in inputs[:NUM_INPUTS]]
    y, new_state = ttt_mlp(*halves, state, 0)
    exact, _ = ttt_mlp(*(t.float() for t in halves), state, 0)
    assert y.dtype == torch.bfloat16
    assert {part.dtype for part in new_state} == {torch.float32}
    torch.testing.assert_close(y, exact.bfloat16())


def test_a_backward_pass_called_under_autocast_runs() -> None:
    inputs = [t.detach().float().requires_grad_() for t in tensors(35)]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(gradient.isfinite().all() for gradient in gradients(inputs, 0, "plain"))


@pytest.mark.parametrize("position", [-1, 16])
def test_a_position_outside_the_mini_batch_is_an_error(position: int) -> None:
    with pytest.raises(ValueError, match=f"position={position}"):
        call(tensors(2), position, "plain")
