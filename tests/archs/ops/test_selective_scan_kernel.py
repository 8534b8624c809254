"""The selective scan in Triton against the definition in float64, in values, gradients and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable
from archs.ops.selective_scan import kernel as kernel_module
from archs.ops.selective_scan import selective_scan, selective_step

HAS_GPU = torch.cuda.is_available()
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")

#: Batch, tokens, channels, state width. On a CPU chunks are of 8 tokens and blocks of 4 channels.
SIZES = [(1, 1, 3, 2), (2, 8, 4, 2), (1, 19, 6, 3), (1, 9, 3, 16)]
if HAS_GPU:
    SIZES += [(2, 63, 24, 16), (1, 300, 96, 16), (1, 1025, 128, 24), (2, 65, 64, 128)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, small sizes take several chunks and blocks of channels."""
    if not HAS_GPU:
        monkeypatch.setattr(kernel_module, "CHUNK_TOKENS", 8)
        monkeypatch.setattr(kernel_module, "BLOCK_CHANNELS", 4)


def make_inputs(
    sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32, *, step: float = 0.1
) -> list[Tensor]:
    """The operation's inputs as a model gives them: x, B and C in `dtype`, the others in float32."""
    batch, tokens, channels, state = sizes
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = step * torch.rand(batch, tokens, channels, generator=generator)
    decay_rates = -torch.arange(1.0, state + 1) * (0.5 + torch.rand(channels, state, generator=generator))
    maps = [normal(batch, tokens, state).to(dtype), normal(batch, tokens, state).to(dtype)]
    tensors = [normal(batch, tokens, channels).to(dtype), dt, decay_rates, *maps]
    tensors += [normal(channels), normal(batch, channels, state)]
    return [tensor.to(device) for tensor in tensors]


def run(inputs: list[Tensor], implementation: str) -> list[Tensor]:
    """y, the final state, and all gradients, given the same gradients of both."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = selective_scan(*leaves, implementation=implementation)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(output.shape, generator=generator).bfloat16().to(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def run_reference(inputs: list[Tensor]) -> list[Tensor]:
    return run([tensor.to("cpu", torch.float64) for tensor in inputs], "reference")


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_those_of_the_definition(
    sizes: tuple[int, ...],
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Callable[..., None],
) -> None:
    inputs = make_inputs(sizes, kernel_device, kernel_dtype)
    actual, expected = run(inputs, "triton"), run_reference(inputs)
    assert (actual[0].dtype, actual[1].dtype) == (kernel_dtype, torch.float32)
    for name, one, other in zip(("y", "final", *NAMES), actual, expected, strict=True):
        assert_kernel_close(one, other, kernel_dtype, name)


def test_steps_that_forget_everything_are_exact(
    kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    inputs = make_inputs((1, 11, 4, 2), kernel_device, step=1000.0)[:-1]  # from zeros, too
    actual, expected = run(inputs, "triton"), run_reference(inputs)
    for name, one, other in zip(("y", "final", *NAMES), actual, expected, strict=False):
        assert_kernel_close(one, other, torch.float32, name)


def test_two_runs_agree_bit_for_bit(kernel_device: torch.device, kernel_dtype: torch.dtype) -> None:
    inputs = make_inputs((1, 10, 6, 2), kernel_device, kernel_dtype)
    for one, other in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cut", [3, 9])
def test_a_state_carries_a_sequence_cut_anywhere(
    cut: int, kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    x, dt, A, B, C, D, initial = make_inputs((1, 17, 4, 2), kernel_device)
    whole, last = selective_scan(x, dt, A, B, C, D, initial, implementation="triton")
    pieces, state = [], initial
    for tokens in (slice(0, cut), slice(cut, 17)):
        inputs = (x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], D, state)
        y, state = selective_scan(*inputs, implementation="triton")
        pieces.append(y)
    assert_kernel_close(torch.cat(pieces, dim=1), whole, torch.float32)
    assert_kernel_close(state, last, torch.float32)


def test_views_and_the_gradients_asked_for(
    kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    """B and C cut from one projection, as a layer does; no gradient where none is wanted."""
    x, dt, A, B, C, D, _ = make_inputs((1, 5, 4, 2), kernel_device)
    gradients = {}
    for implementation, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        joined = torch.cat((B, C), dim=-1).to(dtype).requires_grad_()
        fixed = [tensor.to(dtype) for tensor in (x, dt, A, D)]
        y, _ = selective_scan(*fixed[:3], *joined.split(2, dim=-1), fixed[3], implementation=implementation)
        gradients[implementation] = torch.autograd.grad(y.sin().sum(), joined)[0]
    assert_kernel_close(gradients["triton"], gradients["reference"], torch.float32)


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("width", [3, 16])
def test_steps_are_the_scan(
    width: int,
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Callable[..., None],
) -> None:
    x, dt, A, B, C, D, state = make_inputs((2, 3, 70, width), kernel_device, kernel_dtype)
    expected = [t.to("cpu", torch.float64) for t in (x, dt, A, B, C, D, state)]
    whole, last = selective_scan(*expected, implementation="reference")
    joined = torch.cat((B, C), dim=-1)
    for t in range(3):
        B_t, C_t = joined[:, t].split(width, dim=-1)
        y = selective_step(x[:, t], dt[:, t], A, B_t, C_t, D, state, implementation="triton")
        assert y.dtype == kernel_dtype
        assert_kernel_close(y, whole[:, t], kernel_dtype)
    assert_kernel_close(state, last, kernel_dtype)


def test_without_gradients_nothing_is_kept(kernel_device: torch.device) -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs((1, 1, 3, 2), kernel_device)]
    with torch.no_grad():
        y, state = selective_scan(*inputs, implementation="triton")
    assert y.grad_fn is None and state.grad_fn is None


def test_float64_is_refused(kernel_device: torch.device) -> None:
    inputs = [tensor.double() for tensor in make_inputs((1, 2, 3, 2), kernel_device)]
    with pytest.raises(ImplementationUnavailable, match=r"not torch\.float64"):
        selective_scan(*inputs, implementation="triton")


def test_a_cpu_is_refused_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplementationUnavailable, match=r"'triton' of selective_scan runs on cuda only"):
        selective_scan(*make_inputs((1, 2, 3, 2), torch.device("cpu")), implementation="triton")
