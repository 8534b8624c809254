"""TTT-MLP's Triton kernels against the definition, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from archs.ops.ttt_mlp import TTTMLPWeights, ttt_mlp

NUM_INPUTS = 7  # before the state


class Case(NamedTuple):
    batch: int
    tokens: int
    heads: int
    width: int
    mini_batch: int
    position: int


def tensors(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v, lr, token_scale, ln_weight, ln_bias in `dtype`, both weights and open gradients in float32."""
    batch, num_tokens, heads, width, b, position = case
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape_in, shape_out = (batch, heads, width + 1, 4 * width), (batch, heads, 4 * width + 1, width)
    inputs = [
        *(normal(batch, num_tokens, heads, width) for _ in range(3)),
        normal(batch, num_tokens, heads).sigmoid() / width,
        1 / torch.arange(1, b + 1) + 0.1 * normal(b) / b,
        1 + 0.2 * normal(heads, width),
        0.2 * normal(heads, width),
    ]
    state = [
        normal(*shape_in) / width**0.5,
        normal(*shape_out) / (4 * width) ** 0.5,
        0.1 * normal(*shape_in) * bool(position),
        0.1 * normal(*shape_out) * bool(position),
    ]
    made = [t.to(device, dtype) for t in inputs] + [t.to(device, torch.float32) for t in state]
    return [t.requires_grad_() for t in made]


def call(inputs: list[Tensor], position: int, implementation: str) -> list[Tensor]:
    """y and the four parts of the new state."""
    state = TTTMLPWeights(*inputs[NUM_INPUTS:])
    y, state = ttt_mlp(*inputs[:NUM_INPUTS], state, position, implementation=implementation)
    return [y, *state]


def exact(inputs: list[Tensor]) -> list[Tensor]:
    return [t.detach().to("cpu", torch.float64).requires_grad_() for t in inputs]


@pytest.mark.parametrize("position", [0, 3, 4])
def test_one_token_hands_on_the_weights_of_an_open_mini_batch(
    position: int, kernel_device: torch.device
) -> None:
    inputs = [t.detach() for t in tensors(Case(1, 1, 1, 16, 5, position), torch.float32, kernel_device)]
    before = [t.clone() for t in inputs]
    _, *weights, _, _ = call(inputs, position, "triton")
    given = inputs[NUM_INPUTS : NUM_INPUTS + 2]
    is_open = position < 4
    assert [new is old for new, old in zip(weights, given, strict=True)] == [is_open, is_open]
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


@pytest.mark.parametrize("num_tokens", [1, 12])
def test_the_given_state_is_left_alone(num_tokens: int, kernel_device: torch.device) -> None:
    inputs = [t.detach() for t in tensors(Case(1, num_tokens, 1, 16, 16, 15), torch.float32, kernel_device)]
    before = [t.clone() for t in inputs]
    call(inputs, 15, "triton")
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


def test_tokens_keep_their_dtype_and_views_are_taken(
    kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    inputs = tensors(Case(2, 3, 1, 16, 16, 2), torch.bfloat16, kernel_device)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    shared = [t[:1].expand_as(t) for t in wide[NUM_INPUTS:]]  # as a learned initial state is
    mixed = [*(t.mT.contiguous().mT for t in inputs[:3]), *wide[3:NUM_INPUTS], *shared]
    y, *state = call(mixed, 2, "triton")
    assert y.dtype == torch.bfloat16
    assert {part.dtype for part in state} == {torch.float32}
    expected = call([*exact(inputs[:NUM_INPUTS]), *exact(shared)], 2, "reference")
    for actual, wanted in zip([y, *state], expected, strict=True):
        assert_kernel_close(actual, wanted, torch.bfloat16)
    (gradient,) = torch.autograd.grad(y.float().sum(), inputs[0])
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()
