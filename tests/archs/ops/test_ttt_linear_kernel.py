"""TTT-Linear's Triton kernels against the definition in float64: outputs, states and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable
from archs.ops.ttt_linear import TTTLinearWeights, ttt_linear

CHECKPOINTS = "archs.ops.ttt_linear.kernel.checkpoint_mini_batches"
NAMES = ["q", "k", "v", "lr", "token_scale", "ln_weight", "ln_bias", "weight", "gradient"]
NUM_TOKEN_INPUTS, NUM_INPUTS = 4, 7  # q, k, v, lr; before the state
HAS_GPU = torch.cuda.is_available()
PUBLISHED_WIDTHS = [64, 96, 128]
WIDTHS = PUBLISHED_WIDTHS if HAS_GPU else [16, 24]  # the interpreter is slow

Check = Callable[..., None]


def tensors(
    num_tokens: int,
    *,
    width: int,
    position: int = 0,
    mini_batch_tokens: int = 16,
    batch_size: int = 1,
    heads: int = 1,
) -> list[Tensor]:
    """The inputs in the order of NAMES, float64 that float32 holds exactly, the tokens' in bfloat16."""
    generator = torch.Generator().manual_seed(num_tokens + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = [
        *(normal(batch_size, num_tokens, heads, width) for _ in range(3)),
        normal(batch_size, num_tokens, heads).sigmoid() / width,
        1 / torch.arange(1, mini_batch_tokens + 1) + 0.1 * normal(mini_batch_tokens),
        1 + 0.2 * normal(heads, width),
        0.2 * normal(heads, width),
        0.5 * normal(batch_size, heads, width + 1, width) / width**0.5,
        0.1 * normal(batch_size, heads, width + 1, width) * bool(position),
    ]
    return [(t.bfloat16() if i < NUM_TOKEN_INPUTS else t).double() for i, t in enumerate(inputs)]


def as_inputs(inputs: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Leaves for the kernel: the tokens' tensors in `dtype`, parameters and state in float32. An open
    gradient of zeros needs none, as at the start of training."""
    leaves = [
        t.detach().to(device, dtype if i < NUM_TOKEN_INPUTS else torch.float32) for i, t in enumerate(inputs)
    ]
    return [t.requires_grad_() for t in leaves[:-1]] + [leaves[-1].requires_grad_(bool(leaves[-1].any()))]


def call(inputs: list[Tensor], position: int, implementation: str = "triton") -> list[Tensor]:
    """y and both parts of the state."""
    state = TTTLinearWeights(*inputs[NUM_INPUTS:])
    y, state = ttt_linear(*inputs[:NUM_INPUTS], state, position, implementation=implementation)
    return [y, *state]


def gradients(inputs: list[Tensor], outputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a function of the outputs and both parts of the state, to every input that needs one."""
    y, weight, gradient = (t.to(t.device, torch.promote_types(t.dtype, torch.float32)) for t in outputs)
    total = y.sin().sum() + weight.cos().sum() + (gradient + 1).square().sum()
    return torch.autograd.grad(total, [t for t in inputs if t.requires_grad])


def check_all(
    inputs: list[Tensor],
    position: int,
    device: torch.device,
    dtype: torch.dtype,
    check: Check,
    against: str = "reference",
) -> None:
    actual_inputs = as_inputs(inputs, device, dtype)
    expected_inputs = [t.requires_grad_(a.requires_grad) for t, a in zip(inputs, actual_inputs, strict=True)]
    expected, actual = call(expected_inputs, position, against), call(actual_inputs, position)
    for name, a, e in zip(["y", "final weight", "final gradient"], actual, expected, strict=True):
        check(a.detach(), e.detach(), dtype, name)
    pairs = zip(gradients(actual_inputs, actual), gradients(expected_inputs, expected), strict=True)
    for name, (a, e) in zip(NAMES, pairs, strict=False):
        check(a, e, dtype, f"gradient of {name}")


# One token; a mini-batch less one; whole ones; several and a part; from inside one: to its end, not to
# its end, past it.
CASES = [(1, 0), (15, 0), (16, 0), (37, 0), (3, 13), (4, 5), (29, 5)]
CASES_OF_WIDTHS = [
    *((num_tokens, position, WIDTHS[0]) for num_tokens, position in CASES),
    *((num_tokens, position, width) for width in WIDTHS[1:] for num_tokens, position in [(37, 0), (29, 5)]),
    *(pytest.param(19, 5, width, marks=pytest.mark.published_widths) for width in PUBLISHED_WIDTHS),
]


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(("num_tokens", "position", "width"), CASES_OF_WIDTHS)
def test_values_and_gradients_are_those_of_the_definition(
    num_tokens: int,
    position: int,
    width: int,
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Check,
) -> None:
    inputs = tensors(num_tokens, width=width, position=position, heads=2)
    check_all(inputs, position, kernel_device, kernel_dtype, assert_kernel_close)


# Under a block of rows; over one; several blocks, also begun inside a later one.
MINI_BATCHES = [(1, 5, 0), (4, 11, 2), (17, 20, 0), (24, 30, 20), (64, 70, 40)]


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(("mini_batch_tokens", "num_tokens", "position"), MINI_BATCHES)
def test_any_size_of_mini_batch(
    mini_batch_tokens: int,
    num_tokens: int,
    position: int,
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Check,
) -> None:
    inputs = tensors(num_tokens, width=WIDTHS[0], position=position, mini_batch_tokens=mini_batch_tokens)
    check_all(inputs, position, kernel_device, kernel_dtype, assert_kernel_close)


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(("mini_batch_tokens", "position"), [(8, 3), (8, 0), (20, 9)])
def test_weights_are_recomputed_from_the_stored_ones(
    mini_batch_tokens: int,
    position: int,
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three groups of mini-batches, the last one short."""
    inputs = tensors(
        4 * mini_batch_tokens + 5, width=WIDTHS[0], position=position, mini_batch_tokens=mini_batch_tokens
    )
    monkeypatch.setattr(CHECKPOINTS, lambda _: 2)
    check_all(inputs, position, kernel_device, kernel_dtype, assert_kernel_close)


def test_many_mini_batches_and_rows_of_a_batch(
    kernel_device: torch.device, kernel_dtype: torch.dtype, assert_kernel_close: Check
) -> None:
    inputs = tensors(2000 if HAS_GPU else 40, width=WIDTHS[0], batch_size=2, heads=2)
    check_all(inputs, 0, kernel_device, kernel_dtype, assert_kernel_close, against="plain")


def test_two_runs_agree_bit_for_bit(kernel_device: torch.device, kernel_dtype: torch.dtype) -> None:
    inputs = as_inputs(tensors(35, width=WIDTHS[0], position=5), kernel_device, kernel_dtype)
    first, second = (call(inputs, 5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    pairs = zip(gradients(inputs, first), gradients(inputs, second), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("cut", [7, 16, 27])
def test_two_calls_are_one(
    cut: int, kernel_device: torch.device, kernel_dtype: torch.dtype, assert_kernel_close: Check
) -> None:
    """Values and gradients; against one call, whose rounding is the same to the tolerance."""
    inputs = as_inputs(tensors(40, width=WIDTHS[0]), kernel_device, kernel_dtype)
    whole = call(inputs, 0)
    head, tail = ([t[:, s] for t in inputs[:NUM_TOKEN_INPUTS]] for s in (slice(cut), slice(cut, None)))
    parameters = inputs[NUM_TOKEN_INPUTS:NUM_INPUTS]
    y_head, *state = call([*head, *parameters, *inputs[NUM_INPUTS:]], 0)
    y_tail, *state = call([*tail, *parameters, *state], cut % 16)
    parts = [torch.cat((y_head, y_tail), dim=1), *state]
    for a, e in zip(parts, whole, strict=True):
        assert_kernel_close(a.detach(), e.detach(), kernel_dtype)
    pairs = zip(NAMES, gradients(inputs, parts), gradients(inputs, whole), strict=False)
    for name, a, e in pairs:
        assert_kernel_close(a, e, kernel_dtype, name)


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(
    "width",
    [
        *sorted({*WIDTHS} - {*PUBLISHED_WIDTHS}),
        *(pytest.param(width, marks=pytest.mark.published_widths) for width in PUBLISHED_WIDTHS),
    ],
)
def test_single_tokens_are_those_of_the_definition(
    width: int, kernel_device: torch.device, kernel_dtype: torch.dtype, assert_kernel_close: Check
) -> None:
    """Decoding, across the end of a mini-batch of 4."""
    inputs = as_inputs(tensors(10, width=width, mini_batch_tokens=4, heads=2), kernel_device, kernel_dtype)
    tokens, parameters = inputs[:NUM_TOKEN_INPUTS], inputs[NUM_TOKEN_INPUTS:NUM_INPUTS]
    with torch.no_grad():
        expected = call([t.to("cpu", torch.float64) for t in inputs], 0, "reference")
        state, outputs = inputs[NUM_INPUTS:], []
        for t in range(10):
            y, *state = call([*(x[:, t : t + 1] for x in tokens), *parameters, *state], t % 4)
            outputs.append(y)
    for a, e in zip([torch.cat(outputs, dim=1), *state], expected, strict=True):
        assert_kernel_close(a, e, kernel_dtype)


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_the_given_state_is_left_alone(num_tokens: int, kernel_device: torch.device) -> None:
    inputs = [t.to(kernel_device, torch.float32) for t in tensors(num_tokens, width=WIDTHS[0], position=15)]
    before = [t.clone() for t in inputs]
    call(inputs, 15)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


def test_the_output_has_the_dtype_of_the_tokens(kernel_device: torch.device) -> None:
    """Of q alone: the others may come in another, and q and k in strides of their own."""
    inputs = [t.to(kernel_device, torch.float32) for t in tensors(20, width=WIDTHS[0])]
    q = inputs[0].half()
    strided = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)
    expected = call([q.float(), *inputs[1:]], 0)[0]
    actual = call([q, strided, *inputs[2:]], 0)[0]
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual, expected.half())


def test_a_state_of_another_dtype_is_an_error(kernel_device: torch.device) -> None:
    with pytest.raises(ImplementationUnavailable, match="float64"):
        call([t.to(kernel_device) for t in tensors(2, width=16)], 0)


def test_a_head_that_does_not_fit_on_chip_is_an_error(kernel_device: torch.device) -> None:
    with pytest.raises(ImplementationUnavailable, match="136"):
        call([t.to(kernel_device, torch.float32) for t in tensors(2, width=136)], 0)


def test_without_a_gpu_or_the_interpreter_the_error_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplementationUnavailable, match="runs on cuda only, not on cpu"):
        call([t.float() for t in tensors(2, width=16)], 0)
