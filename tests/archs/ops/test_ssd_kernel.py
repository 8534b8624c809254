"""State-space duality in Triton against the definition in float64, in values, gradients and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable
from archs.ops.ssd import kernel as kernel_module
from archs.ops.ssd import ssd, ssd_step

HAS_GPU = torch.cuda.is_available()
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")

#: Batch, tokens, heads, head width, groups, state width, tokens of a chunk. Tiles are 16 wide on a CPU.
SIZES = [(1, 1, 2, 16, 1, 16, 16), (2, 21, 1, 24, 1, 16, 16), (1, 39, 2, 16, 2, 20, 32)]
#: Likewise, of published widths: they take several of the kernel's own tiles.
PUBLISHED_SIZES = [(1, 35, 1, 64, 1, 128, 32), (1, 19, 1, 96, 1, 96, 16), (1, 19, 1, 128, 1, 64, 16)]
MAX_TILE = kernel_module.MAX_TILE
if HAS_GPU:
    SIZES += [
        (2, 63, 4, 64, 1, 128, 256),
        (1, 300, 4, 96, 2, 64, 128),
        (1, 1025, 2, 128, 1, 128, 256),
        (2, 257, 3, 24, 3, 96, 64),
    ]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, small sizes take several tiles of each kind."""
    if not HAS_GPU:
        monkeypatch.setattr(kernel_module, "MAX_TILE", {tl.float32: 16})


def make_inputs(
    sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32, *, step: float = 0.1
) -> list[Tensor]:
    """The operation's inputs as a model gives them: x, B and C in `dtype`, the others in float32."""
    batch, tokens, heads, width, groups, state = sizes
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = step * torch.rand(batch, tokens, heads, generator=generator)
    maps = [normal(batch, tokens, groups, state).to(dtype), normal(batch, tokens, groups, state).to(dtype)]
    tensors = [normal(batch, tokens, heads, width).to(dtype), dt, -torch.arange(1.0, heads + 1), *maps]
    tensors += [normal(heads), normal(batch, heads, width, state)]
    return [tensor.to(device) for tensor in tensors]


def run(inputs: list[Tensor], chunk_tokens: int, implementation: str) -> list[Tensor]:
    """y, the final state, and all gradients, given the same gradients of both."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = ssd(*leaves, chunk_tokens=chunk_tokens, implementation=implementation)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(output.shape, generator=generator).bfloat16().to(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def run_reference(inputs: list[Tensor], chunk_tokens: int) -> list[Tensor]:
    return run([tensor.to("cpu", torch.float64) for tensor in inputs], chunk_tokens, "reference")


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(
    "sizes",
    [*SIZES, *(pytest.param(sizes, marks=pytest.mark.published_widths) for sizes in PUBLISHED_SIZES)],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_definition(
    sizes: tuple[int, ...],
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sizes in PUBLISHED_SIZES:
        monkeypatch.setattr(kernel_module, "MAX_TILE", MAX_TILE)
    inputs = make_inputs(sizes[:-1], kernel_device, kernel_dtype)
    actual = run(inputs, sizes[-1], "triton")
    assert (actual[0].dtype, actual[1].dtype) == (kernel_dtype, torch.float32)
    expected = run_reference(inputs, sizes[-1])
    for name, one, other in zip(("y", "final", *NAMES), actual, expected, strict=True):
        assert_kernel_close(one, other, kernel_dtype, name)


def test_steps_that_forget_everything_are_exact(
    kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    inputs = make_inputs((1, 37, 1, 16, 1, 16), kernel_device, step=1000.0)[:-1]  # from zeros, too
    actual, expected = run(inputs, 32, "triton"), run_reference(inputs, 32)
    for name, one, other in zip(("y", "final", *NAMES), actual, expected, strict=False):
        assert_kernel_close(one, other, torch.float32, name)


def test_two_runs_agree_bit_for_bit(kernel_device: torch.device, kernel_dtype: torch.dtype) -> None:
    inputs = make_inputs((1, 18, 2, 16, 1, 16), kernel_device, kernel_dtype)
    for one, other in zip(run(inputs, 16, "triton"), run(inputs, 16, "triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cut", [7, 33])
def test_a_state_carries_a_sequence_cut_anywhere(
    cut: int, kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    x, dt, A, B, C, D, initial = make_inputs((1, 40, 1, 16, 1, 16), kernel_device)
    whole, last = ssd(x, dt, A, B, C, D, initial, chunk_tokens=32, implementation="triton")
    pieces, state = [], initial
    for tokens in (slice(0, cut), slice(cut, 40)):
        y, state = ssd(
            *(x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], D, state),
            chunk_tokens=32,
            implementation="triton",
        )
        pieces.append(y)
    assert_kernel_close(torch.cat(pieces, dim=1), whole, torch.float32)
    assert_kernel_close(state, last, torch.float32)


def test_views_and_the_gradients_asked_for(
    kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    """x, B and C cut from one projection, as a layer does; no gradient where none is wanted."""
    x, dt, A, B, C, D, _ = make_inputs((1, 5, 2, 16, 1, 16), kernel_device)
    gradients = {}
    for implementation, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        joined = torch.cat((x.flatten(2), B.flatten(2), C.flatten(2)), dim=-1).to(dtype).requires_grad_()
        one, two, three = joined.split((32, 16, 16), dim=-1)
        maps = (two.unflatten(-1, (1, 16)), three.unflatten(-1, (1, 16)))
        fixed = [tensor.to(dtype) for tensor in (dt, A, D)]
        y, _ = ssd(one.unflatten(-1, (2, 16)), *fixed[:2], *maps, fixed[2], implementation=implementation)
        gradients[implementation] = torch.autograd.grad(y.sin().sum(), joined)[0]
    assert_kernel_close(gradients["triton"], gradients["reference"], torch.float32)


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(
    ("width", "state_width"),
    [
        (24, 20),
        *(pytest.param(*w, marks=pytest.mark.published_widths) for w in ((64, 128), (96, 96), (128, 64))),
    ],
)
def test_steps_are_the_whole(
    width: int,
    state_width: int,
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Callable[..., None],
) -> None:
    x, dt, A, B, C, D, state = make_inputs((2, 3, 4, width, 2, state_width), kernel_device, kernel_dtype)
    expected = [t.to("cpu", torch.float64) for t in (x, dt, A, B, C, D, state)]
    whole, last = ssd(*expected, implementation="reference")
    joined = torch.cat((B, C), dim=-1)
    for t in range(3):
        B_t, C_t = joined[:, t].split(state_width, dim=-1)
        y = ssd_step(x[:, t], dt[:, t], A, B_t, C_t, D, state, implementation="triton")
        assert y.dtype == kernel_dtype
        assert_kernel_close(y, whole[:, t], kernel_dtype)
    assert_kernel_close(state, last, kernel_dtype)


def test_without_gradients_nothing_is_kept(kernel_device: torch.device) -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs((1, 1, 2, 16, 1, 16), kernel_device)]
    with torch.no_grad():
        y, state = ssd(*inputs, implementation="triton")
    assert y.grad_fn is None and state.grad_fn is None


def test_float64_is_refused(kernel_device: torch.device) -> None:
    inputs = [tensor.double() for tensor in make_inputs((1, 2, 2, 16, 1, 16), kernel_device)]
    with pytest.raises(ImplementationUnavailable, match=r"not torch\.float64"):
        ssd(*inputs, implementation="triton")


def test_a_cpu_is_refused_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplementationUnavailable, match=r"'triton' of ssd runs on cuda only"):
        ssd(*make_inputs((1, 2, 2, 16, 1, 16), torch.device("cpu")), implementation="triton")
