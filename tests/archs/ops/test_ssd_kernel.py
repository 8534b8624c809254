"""State-space duality in Triton against the definition in float64, in values, gradients and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from torch import Tensor

from archs.ops.ssd import kernel as kernel_module
from archs.ops.ssd import ssd

HAS_GPU = torch.cuda.is_available()


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


def test_without_gradients_nothing_is_kept(kernel_device: torch.device) -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs((1, 1, 2, 16, 1, 16), kernel_device)]
    with torch.no_grad():
        y, state = ssd(*inputs, implementation="triton")
    assert y.grad_fn is None and state.grad_fn is None
