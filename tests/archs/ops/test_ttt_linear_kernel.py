"""TTT-Linear's Triton kernels against the definition in float64: outputs, states and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable
from archs.ops.ttt_linear import TTTLinearWeights, ttt_linear

NUM_TOKEN_INPUTS, NUM_INPUTS = 4, 7  # q, k, v, lr; before the state
HAS_GPU = torch.cuda.is_available()
PUBLISHED_WIDTHS = [64, 96, 128]
WIDTHS = PUBLISHED_WIDTHS if HAS_GPU else [16, 24]  # the interpreter is slow


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


def call(inputs: list[Tensor], position: int, implementation: str = "triton") -> list[Tensor]:
    """y and both parts of the state."""
    state = TTTLinearWeights(*inputs[NUM_INPUTS:])
    y, state = ttt_linear(*inputs[:NUM_INPUTS], state, position, implementation=implementation)
    return [y, *state]


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


def test_a_head_that_does_not_fit_on_chip_is_an_error(kernel_device: torch.device) -> None:
    with pytest.raises(ImplementationUnavailable, match="136"):
        call([t.to(kernel_device, torch.float32) for t in tensors(2, width=136)], 0)
