"""TTT-MLP's Triton kernels against the definition, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable
from archs.ops.ttt_mlp import TTTMLPWeights, ttt_mlp

NUM_INPUTS = 7  # before the state
STATE_NAMES = ["weight_in", "weight_out", "gradient_in", "gradient_out"]
NAMES = ["q", "k", "v", "lr", "token_scale", "ln_weight", "ln_bias", *STATE_NAMES]


class Case(NamedTuple):
    batch: int
    tokens: int
    heads: int
    width: int
    mini_batch: int
    position: int


CASES = [
    Case(1, 1, 1, 16, 16, 0),
    Case(1, 1, 2, 24, 16, 15),  # one token closes the mini-batch
    Case(2, 5, 1, 16, 10, 3),  # inside a mini-batch of no power of two
    Case(1, 38, 1, 24, 16, 5),  # two groups of mini-batches, both ends open
    Case(1, 32, 2, 16, 16, 0),
    Case(1, 48, 1, 16, 40, 35),  # mini-batches longer than a chunk
    Case(1, 3, 1, 16, 1, 0),  # online gradient descent
]
PUBLISHED_CASES = [
    pytest.param(Case(1, 19, 1, width, 16, 5), marks=pytest.mark.published_widths) for width in (64, 96, 128)
]
GPU_CASES = [Case(2, 200, 3, width, b, 7) for width in (64, 96, 128) for b in (16, 64)]
DECODE_CASES = [
    Case(1, 1, 2, 16, 16, 0),
    Case(2, 1, 2, 24, 16, 7),  # three blocks of hidden columns
    Case(1, 1, 2, 24, 16, 15),
    Case(1, 1, 3, 12, 4, 2),  # the last block is not full
    Case(2, 1, 1, 16, 10, 4),
    Case(1, 1, 1, 16, 10, 9),
    Case(1, 1, 2, 16, 1, 0),  # every token closes its mini-batch
]
PUBLISHED_DECODE_CASES = [
    pytest.param(Case(1, 1, 1, width, 16, position), marks=pytest.mark.published_widths)
    for width, position in ((64, 3), (96, 15), (128, 3))
]


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


def with_gradients(inputs: list[Tensor], position: int, implementation: str) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random function of all of them."""
    outputs = call(inputs, position, implementation)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    # The open gradient of a mini-batch that is complete is 0, a constant in the reference.
    ends = [(t, c.to(t)) for t, c in zip(outputs, cotangents, strict=True) if t.requires_grad]
    wanted = torch.autograd.grad([t for t, _ in ends], inputs, [c for _, c in ends])
    return {
        **dict(zip(["y", *STATE_NAMES], outputs, strict=True)),
        **dict(zip((f"d {name}" for name in NAMES), wanted, strict=True)),
    }


def exact(inputs: list[Tensor]) -> list[Tensor]:
    return [t.detach().to("cpu", torch.float64).requires_grad_() for t in inputs]


@pytest.mark.parametrize("case", CASES + PUBLISHED_CASES, ids=str)
@pytest.mark.usefixtures("nan_filled_buffers")
def test_values_and_gradients_are_those_of_the_definition(
    case: Case,
    kernel_dtype: torch.dtype,
    kernel_device: torch.device,
    assert_kernel_close: Callable[..., None],
) -> None:
    inputs = tensors(case, kernel_dtype, kernel_device)
    actual = with_gradients(inputs, case.position, "triton")
    expected = with_gradients(exact(inputs), case.position, "reference")
    for name, value in actual.items():
        assert_kernel_close(value, expected[name], kernel_dtype, name)
    with torch.no_grad():
        unrecorded = call(inputs, case.position, "triton")
    for name, value in zip(["y", *STATE_NAMES], unrecorded, strict=True):
        torch.testing.assert_close(value, actual[name].detach(), rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real widths are for a GPU")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_real_widths_give_the_values_and_gradients_of_plain(
    case: Case,
    kernel_dtype: torch.dtype,
    kernel_device: torch.device,
    assert_kernel_close: Callable[..., None],
) -> None:
    inputs = tensors(case, kernel_dtype, kernel_device)
    actual = with_gradients(inputs, case.position, "triton")
    expected = with_gradients(exact(inputs), case.position, "plain")
    for name, value in actual.items():
        assert_kernel_close(value, expected[name], kernel_dtype, name)
    again = with_gradients(inputs, case.position, "triton")
    torch.testing.assert_close(again, actual, rtol=0, atol=0)


def test_two_runs_agree_bit_for_bit(kernel_dtype: torch.dtype, kernel_device: torch.device) -> None:
    inputs = tensors(Case(1, 19, 2, 16, 16, 4), kernel_dtype, kernel_device)
    first, second = (with_gradients(inputs, 4, "triton") for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("cuts", [[0, 17, 26], [0, 1, 2, 26]])
def test_several_calls_continue_one_another(
    cuts: list[int],
    kernel_dtype: torch.dtype,
    kernel_device: torch.device,
    assert_kernel_close: Callable[..., None],
) -> None:
    inputs = [t.detach() for t in tensors(Case(1, 26, 1, 16, 16, 14), kernel_dtype, kernel_device)]
    tokens, outer, state = inputs[:4], inputs[4:NUM_INPUTS], inputs[NUM_INPUTS:]
    expected = call(inputs, 14, "triton")
    outputs = []
    for start, stop in pairwise(cuts):
        part = [t[:, start:stop] for t in tokens]
        y, *state = call([*part, *outer, *state], (14 + start) % 16, "triton")
        outputs.append(y)
    names = ["y", *STATE_NAMES]
    for actual, wanted, name in zip([torch.cat(outputs, 1), *state], expected, names, strict=True):
        assert_kernel_close(actual, wanted, kernel_dtype, name)


@pytest.mark.parametrize("case", DECODE_CASES + PUBLISHED_DECODE_CASES, ids=str)
@pytest.mark.usefixtures("nan_filled_buffers")
def test_one_token_is_that_of_the_definition_and_the_same_again(
    case: Case,
    kernel_dtype: torch.dtype,
    kernel_device: torch.device,
    assert_kernel_close: Callable[..., None],
) -> None:
    inputs = [t.detach() for t in tensors(case, kernel_dtype, kernel_device)]
    actual = call(inputs, case.position, "triton")
    with torch.no_grad():
        expected = call(exact(inputs), case.position, "reference")
    for value, wanted, name in zip(actual, expected, ["y", *STATE_NAMES], strict=True):
        assert_kernel_close(value, wanted, kernel_dtype, name)
    torch.testing.assert_close(call(inputs, case.position, "triton"), actual, rtol=0, atol=0)


@pytest.mark.usefixtures("nan_filled_buffers")
def test_single_tokens_are_one_call(
    kernel_dtype: torch.dtype,
    kernel_device: torch.device,
    assert_kernel_close: Callable[..., None],
) -> None:
    """Across the ends of two mini-batches of 3."""
    case = Case(2, 5, 1, 16, 3, 2)
    inputs = [t.detach() for t in tensors(case, kernel_dtype, kernel_device)]
    tokens, outer, state = inputs[:4], inputs[4:NUM_INPUTS], inputs[NUM_INPUTS:]
    expected = call(inputs, case.position, "triton")
    outputs = []
    for t in range(case.tokens):
        part = [x[:, t : t + 1] for x in tokens]
        y, *state = call([*part, *outer, *state], (case.position + t) % case.mini_batch, "triton")
        outputs.append(y)
    names = ["y", *STATE_NAMES]
    for actual, wanted, name in zip([torch.cat(outputs, 1), *state], expected, names, strict=True):
        assert_kernel_close(actual, wanted, kernel_dtype, name)


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


def test_a_state_in_another_dtype_is_an_error(kernel_device: torch.device) -> None:
    inputs = [t.detach().double() for t in tensors(CASES[0], torch.float32, kernel_device)]
    with pytest.raises(ValueError, match=r"float32 state, not torch\.float64"):
        call(inputs, 0, "triton")


def test_a_cpu_without_the_interpreter_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = tensors(CASES[0], torch.float32, torch.device("cpu"))
    with pytest.raises(ImplementationUnavailable, match="runs on cuda only, not on cpu"):
        call(inputs, 0, "triton")
