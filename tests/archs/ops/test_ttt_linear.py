"""TTT-Linear's operation: the dual form against the definition, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from archs.ops.ttt_linear import TTTLinearWeights, ttt_linear

NUM_INPUTS = 7  # before the state


def tensors(num_tokens: int, *, position: int = 0, mini_batch_tokens: int = 16) -> list[Tensor]:
    """q, k, v, lr, token_scale, ln_weight, ln_bias, weight and open gradient, in float64."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, heads, width = 2, 2, 4
    inputs = [
        *(normal(batch, num_tokens, heads, width) for _ in range(3)),
        normal(batch, num_tokens, heads).sigmoid() / width,
        1 / torch.arange(1, mini_batch_tokens + 1) + 0.1 * normal(mini_batch_tokens),
        1 + 0.2 * normal(heads, width),
        0.2 * normal(heads, width),
        0.5 * normal(batch, heads, width + 1, width),
        0.1 * normal(batch, heads, width + 1, width) * bool(position),
    ]
    return [t.requires_grad_() for t in inputs]


def call(inputs: list[Tensor], position: int, implementation: str) -> tuple[Tensor, TTTLinearWeights]:
    state = TTTLinearWeights(*inputs[NUM_INPUTS:])
    return ttt_linear(*inputs[:NUM_INPUTS], state, position, implementation=implementation)


def gradients(inputs: list[Tensor], position: int, implementation: str) -> tuple[Tensor, ...]:
    """Of a function of the outputs and both parts of the state."""
    y, state = call(inputs, position, implementation)
    total = y.sin().sum() + state.weight.cos().sum() + state.gradient.square().sum()
    wanted = inputs if position else inputs[:-1]  # an empty mini-batch has no open gradient
    return torch.autograd.grad(total, wanted)


def test_one_step_against_arithmetic_by_hand() -> None:
    """With W = 0 and bias = 0 the normalised z is 0, so f(k) = k + ln_bias, and the LayerNorm's
    derivative is that at a vector without variance: centring, over sqrt(eps)."""
    eps, width = 0.25, 2
    k, v, q = torch.tensor([2.0, 1.0]), torch.tensor([5.0, 1.0]), torch.tensor([1.0, 3.0])
    error = k - v  # [-3, 0]; centred [-1.5, 1.5]; over sqrt(0.25): [-3, 3]
    assert error.tolist() == [-3.0, 0.0]
    step = torch.tensor([-3.0, 3.0])
    weight = -0.5 * 0.1 * torch.stack((2 * step, 1 * step, step))  # token_scale, lr, rows k and bias
    z = q @ weight[:2] + weight[2]
    expected = q + z / (z.var(unbiased=False) + eps).sqrt()
    zeros = torch.zeros(1, 1, width + 1, width)
    y, state = ttt_linear(
        *(t.reshape(1, 1, 1, width) for t in (q, k, v)),
        torch.full((1, 1, 1), 0.1),
        torch.tensor([0.5]),
        torch.ones(1, width),
        torch.zeros(1, width),
        TTTLinearWeights(zeros, zeros),
        0,
        norm_eps=eps,
    )
    torch.testing.assert_close(y.flatten(), expected)
    torch.testing.assert_close(state.weight[0, 0], weight)


def test_half_precision_tokens_are_computed_in_the_states_dtype() -> None:
    inputs = [t.detach() for t in tensors(20)]
    state = TTTLinearWeights(*(t.float() for t in inputs[NUM_INPUTS:]))
    halves = [t.bfloat16() for t in inputs[:NUM_INPUTS]]
    y, new_state = ttt_linear(*halves, state, 0)
    exact, _ = ttt_linear(*(t.float() for t in halves), state, 0)
    assert y.dtype == torch.bfloat16 and new_state.weight.dtype == torch.float32
    torch.testing.assert_close(y, exact.bfloat16())


def test_a_backward_pass_called_under_autocast_runs() -> None:
    inputs = [t.detach().float().requires_grad_() for t in tensors(35)]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(gradient.isfinite().all() for gradient in gradients(inputs, 0, "plain"))


@pytest.mark.parametrize("position", [-1, 16])
def test_a_position_outside_the_mini_batch_is_an_error(position: int) -> None:
    with pytest.raises(ValueError, match=f"position={position}"):
        call(tensors(2), position, "plain")
