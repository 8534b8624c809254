"""The neural memory in Triton against the definition in float64, in values, gradients and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops.neural_memory import NeuralMemoryState, neural_memory
from archs.ops.operation import ImplementationUnavailable

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()


def make_case(
    widths: tuple[int, ...], num_tokens: int, num_heads: int, dtype: torch.dtype, batch_size: int = 1
) -> list[Tensor]:
    """q, k, v, decay, step size, momentum, and start, weights and momentum of every layer. Tokens and gates
    are rounded to `dtype`."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = [normal(batch_size, num_tokens, num_heads, w) for w in (widths[0], widths[0], widths[-1])]
    tokens = [F.normalize(tokens[0], dim=-1), F.normalize(tokens[1], dim=-1), tokens[2]]
    gates = [normal(batch_size, num_tokens, num_heads).sigmoid() * scale for scale in (0.5, 0.1, 0.75)]
    state = [
        normal(batch_size, num_heads, *pair) * (scale / pair[0] ** 0.5)
        for scale in (1, 1, 0.3)
        for pair in itertools.pairwise(widths)
    ]
    return [t.to(dtype) for t in tokens + gates] + [t.float() for t in state]


def run(
    case: list[Tensor], implementation: str, position: int, chunk_tokens: int
) -> tuple[Tensor, NeuralMemoryState]:
    depth = (len(case) - 6) // 3
    parts = (tuple(case[6 + i * depth : 6 + (i + 1) * depth]) for i in range(3))
    options = dict(chunk_tokens=chunk_tokens, implementation=implementation)
    return neural_memory(*case[:6], NeuralMemoryState(*parts), position, **options)


def test_no_two_tensors_of_a_state_share_storage(kernel_device: torch.device) -> None:
    case = [t.to(kernel_device) for t in make_case((16, 16, 16), 4, 1, torch.float32)]
    with torch.no_grad():
        _, state = run(case, "triton", 0, 4)
    pointers = [t.untyped_storage().data_ptr() for t in itertools.chain(*state)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(dtype=torch.float64), "keeps its state in float32 only, not in torch.float64"),
        (dict(chunk_tokens=65), "takes chunks of up to 64 tokens, not of 65"),
        (dict(widths=(16, 16, 32, 16)), r"needs hidden layers of one width, not of \(16, 32\)"),
    ],
)
def test_what_it_does_not_do_is_said(change: dict[str, Any], why: str, kernel_device: torch.device) -> None:
    case = make_case(change.get("widths", (16, 16)), 2, 1, torch.float32)
    case = [t.to(kernel_device, change.get("dtype")) for t in case]
    with pytest.raises(ImplementationUnavailable, match=f"{why}; choose implementation 'plain'"):
        run(case, "triton", 0, change.get("chunk_tokens", 4))
