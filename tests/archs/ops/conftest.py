"""What the tests of our Triton kernels share. They run on a GPU where there is one, in float32 and bfloat16,
and otherwise on a CPU in Triton's interpreter, in float32 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()

#: Largest relative error in the 2-norm against the float64 reference on the same rounded inputs.
KERNEL_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where kernels run in this test run."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def kernel_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of a kernel's inputs: every one that runs here."""
    if request.param == torch.bfloat16 and not HAS_GPU:
        pytest.skip("bfloat16 kernels are checked on a GPU")
    return request.param


@pytest.fixture(scope="session")
def assert_kernel_close() -> Callable[..., None]:
    """(actual, expected, dtype, name): fails where the relative error is over the dtype's tolerance."""

    def check(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "output") -> None:
        assert actual.shape == expected.shape, name
        expected = expected.to("cpu", torch.float64)
        error = (actual.to("cpu", torch.float64) - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= KERNEL_TOLERANCES[dtype], f"{name}: relative error {error:.3g}"  # not for NaN either

    return check


@pytest.fixture
def nan_filled_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every empty buffer holds NaN, so that what a kernel does not write is seen."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))
