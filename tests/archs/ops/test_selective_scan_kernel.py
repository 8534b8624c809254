"""The selective scan in Triton against the definition in float64, in values, gradients and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archs.ops.selective_scan import kernel as kernel_module
from archs.ops.selective_scan import selective_scan

HAS_GPU = torch.cuda.is_available()


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


def test_without_gradients_nothing_is_kept(kernel_device: torch.device) -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs((1, 1, 3, 2), kernel_device)]
    with torch.no_grad():
        y, state = selective_scan(*inputs, implementation="triton")
    assert y.grad_fn is None and state.grad_fn is None
