"""TTT-Linear's operation: the dual form against the definition, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable
from archs.ops.ttt_linear import TTTLinearWeights, ttt_linear

NUM_INPUTS = 7  # before the state
GROUP = "archs.ops.ttt_linear.plain.GROUP_MINI_BATCHES"


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


CASES = [(1, 0), (15, 0), (16, 0), (17, 0), (65, 0), (1, 15), (3, 4), (11, 5), (29, 5)]


@pytest.mark.parametrize(("num_tokens", "position"), CASES)
def test_plain_is_the_definition(num_tokens: int, position: int) -> None:
    inputs = tensors(num_tokens, position=position)
    with torch.no_grad():
        expected, expected_state = call(inputs, position, "reference")
        y, state = call(inputs, position, "plain")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("num_tokens", "position"), [(5, 0), (32, 0), (30, 5)])
def test_plain_gradients_are_those_of_the_definition(num_tokens: int, position: int) -> None:
    inputs = tensors(num_tokens, position=position)
    torch.testing.assert_close(
        gradients(inputs, position, "plain"),
        gradients(inputs, position, "reference"),
        rtol=1e-9,
        atol=1e-10,
    )


def test_groups_of_mini_batches_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GROUP, 2)
    inputs = tensors(70, position=10)
    torch.testing.assert_close(call(inputs, 10, "plain"), call(inputs, 10, "reference"), rtol=0, atol=1e-11)
    torch.testing.assert_close(
        gradients(inputs, 10, "plain"), gradients(inputs, 10, "reference"), rtol=1e-9, atol=1e-10
    )


@torch.no_grad()
def test_groups_follow_one_another_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GROUP, 1)
    inputs = tensors(150, position=10)  # 9 mini-batches in groups of 4
    torch.testing.assert_close(call(inputs, 10, "plain"), call(inputs, 10, "reference"), rtol=0, atol=1e-11)


def test_a_mini_batch_of_one_token_is_online_gradient_descent() -> None:
    inputs = tensors(9, mini_batch_tokens=1)
    torch.testing.assert_close(call(inputs, 0, "plain"), call(inputs, 0, "reference"), rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("implementation", ["plain", "reference"])
def test_the_given_state_is_left_alone(implementation: str) -> None:
    inputs = [t.detach() for t in tensors(40, position=3)]
    before = [t.clone() for t in inputs]
    call(inputs, 3, implementation)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


def test_half_precision_tokens_are_computed_in_the_states_dtype() -> None:
    inputs = [t.detach() for t in tensors(20)]
    state = TTTLinearWeights(*(t.float() for t in inputs[NUM_INPUTS:]))
    halves = [t.bfloat16() for t in inputs[:NUM_INPUTS]]
    y, new_state = ttt_linear(*halves, state, 0)
    exact, _ = ttt_linear(*(t.float() for t in halves), state, 0)
    assert y.dtype == torch.bfloat16 and new_state.weight.dtype == torch.float32
    torch.testing.assert_close(y, exact.bfloat16())


def test_autocast_reaches_neither_the_values_nor_the_inner_gradients() -> None:
    inputs = [t.detach().float().requires_grad_() for t in tensors(35)]
    expected = call(inputs, 0, "plain")[0]
    wanted = torch.autograd.grad(expected.sin().sum(), inputs[:NUM_INPUTS])
    with torch.autocast("cpu", torch.bfloat16):
        y = call(inputs, 0, "plain")[0]
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    actual = torch.autograd.grad(y.sin().sum(), inputs[:NUM_INPUTS])
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_a_backward_pass_called_under_autocast_runs() -> None:
    inputs = [t.detach().float().requires_grad_() for t in tensors(35)]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(gradient.isfinite().all() for gradient in gradients(inputs, 0, "plain"))


@pytest.mark.parametrize("position", [-1, 16])
def test_a_position_outside_the_mini_batch_is_an_error(position: int) -> None:
    with pytest.raises(ValueError, match=f"position={position}"):
        call(tensors(2), position, "plain")


def test_an_unknown_implementation_names_the_valid_ones() -> None:
    with pytest.raises(ImplementationUnavailable, match="plain"):
        call(tensors(2), 0, "cuda_graph")
