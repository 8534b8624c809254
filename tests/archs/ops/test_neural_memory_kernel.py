"""The neural memory in Triton against the definition in float64, in values, gradients and refusals."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops.neural_memory import NeuralMemoryState, neural_memory
from archs.ops.operation import ImplementationUnavailable

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()

#: widths, chunk tokens, position, tokens, heads.
CASES = {
    "one_token": ((16, 16), 4, 0, 1, 1),
    "linear": ((24, 20), 5, 0, 7, 1),
    "inside_a_chunk": ((16, 16, 16), 8, 3, 2, 1),
    "cut_chunks_and_tiles": ((16, 32, 16), 4, 3, 5, 2),
    "more_groups_than_one": ((16, 16, 16), 2, 1, 5, 1),
    "odd_widths": ((16, 24, 20), 17, 0, 19, 1),
    "deeper": ((16, 24, 24, 16), 3, 2, 4, 1),
    "deepest": ((16, 16, 16, 16, 16), 3, 0, 3, 1),
}
if HAS_GPU:
    CASES |= {
        "64": ((64, 256, 64), 16, 5, 203, 3),
        "64_linear": ((64, 64), 16, 0, 160, 3),
        "64_long_chunks": ((64, 128, 64), 64, 0, 200, 3),
        "64_deepest": ((64, 128, 128, 128, 64), 16, 0, 65, 2),
        "96": ((96, 192, 96), 16, 1, 130, 2),
        "128": ((128, 256, 128), 16, 0, 127, 2),
    }
PUBLISHED_CASES = {f"published_{w}": ((w, 2 * w, w), 16, 5, 19, 1) for w in (64, 96, 128)}
GATES = slice(3, 6)
KERNEL = "archs.ops.neural_memory.kernel"


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


def outputs_and_gradients(
    case: list[Tensor],
    implementation: str,
    position: int,
    chunk_tokens: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """By name: y, the new state, and every gradient of a random sum of them all."""
    leaves = [t.to(device, dtype or t.dtype).requires_grad_() for t in case]
    y, state = run(leaves, implementation, position, chunk_tokens)
    results = {"y": y}
    for part, matrices in state._asdict().items():
        results |= {f"{part}{layer}": w for layer, w in enumerate(matrices)}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in results.values()]
    loss = sum((t * w.to(t.device, t.dtype)).sum() for t, w in zip(results.values(), weights, strict=True))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    results |= {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
    return results


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.published_widths) for name in PUBLISHED_CASES)]
)
def test_outputs_states_and_gradients(
    name: str,
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "more_groups_than_one":
        monkeypatch.setattr(importlib.import_module(KERNEL), "checkpoint_chunks_of", lambda num_chunks: 2)
    widths, chunk_tokens, position, num_tokens, num_heads = (CASES | PUBLISHED_CASES)[name]
    case = make_case(widths, num_tokens, num_heads, kernel_dtype)
    actual = outputs_and_gradients(case, "triton", position, chunk_tokens, kernel_device)
    expected = outputs_and_gradients(
        case, "reference", position, chunk_tokens, torch.device("cpu"), torch.float64
    )
    assert actual.keys() == expected.keys()
    assert actual["y"].dtype == kernel_dtype
    for what, value in expected.items():
        assert_kernel_close(actual[what], value, kernel_dtype, what)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gates_of_exactly_zero_and_one(
    value: float, kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    case = make_case((16, 16), 5, 1, torch.float32)
    for gate in case[GATES]:
        gate[:, 1:4] = value
    actual = outputs_and_gradients(case, "triton", 0, 4, kernel_device)
    expected = outputs_and_gradients(case, "reference", 0, 4, torch.device("cpu"), torch.float64)
    for what, tensor in expected.items():
        assert_kernel_close(actual[what], tensor, torch.float32, what)


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(
    ("widths", "batch_size", "num_heads", "calls"),
    [
        ((16, 16), 2, 2, (4, 1, 1, 1)),
        ((24, 40, 24), 2, 1, (4, 1, 1, 1)),
        ((16, 16, 16, 16, 16), 2, 1, (4, 1, 1, 1)),
        *(
            pytest.param((w, 2 * w, w), 1, 1, (1, 1, 1, 1), marks=pytest.mark.published_widths)
            for w in (64, 96, 128)
        ),
    ],
    ids=str,
)
def test_without_gradients_calls_may_be_cut_anywhere(
    widths: tuple[int, ...],
    batch_size: int,
    num_heads: int,
    calls: tuple[int, ...],
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Callable[..., None],
) -> None:
    """Whole walks, walks that start and end inside a chunk, and single tokens, of chunks of three."""
    case = make_case(widths, sum(calls), num_heads, kernel_dtype, batch_size)
    expected, expected_state = run([t.double() for t in case], "reference", 0, 3)
    case = [t.to(kernel_device) for t in case]
    kept = [t.clone() for t in case]
    outputs, first, pieces = [], 0, list(case)
    with torch.no_grad():
        for num_tokens in calls:
            pieces[:6] = [t[:, first : first + num_tokens] for t in case[:6]]
            y, state = run(pieces, "triton", first % 3, 3)
            pieces[6:] = itertools.chain(*state)
            outputs.append(y)
            first += num_tokens
    assert_kernel_close(torch.cat(outputs, dim=1), expected, kernel_dtype)
    for actual, value in zip(itertools.chain(*state), itertools.chain(*expected_state), strict=True):
        assert_kernel_close(actual, value, kernel_dtype)
    assert all(map(torch.equal, case, kept))


def test_two_runs_agree_bit_for_bit(kernel_device: torch.device, kernel_dtype: torch.dtype) -> None:
    case = make_case((16, 24, 16), 3, 1, kernel_dtype)
    first, second = (outputs_and_gradients(case, "triton", 1, 2, kernel_device) for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


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


def test_a_cpu_without_the_interpreter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplementationUnavailable, match="'triton' of neural_memory runs on cuda only"):
        run(make_case((16, 16), 2, 1, torch.float32), "triton", 0, 4)
