"""Building blocks that have a form of their own beside torch's, for large inputs on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from archs.layers import RMSNorm
from archs.ops.elementwise import MANY_NUMBERS, gelu, rms_norm

WIDTH = 48
FEW, MANY = 3, MANY_NUMBERS // (2 * WIDTH) + 1


def norm_and_input(dtype: torch.dtype, num_rows: int) -> tuple[RMSNorm, Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(WIDTH, eps=1e-5).to(dtype)
    norm.weight.data = torch.rand(WIDTH, generator=generator).to(dtype)
    x = torch.randn(2, num_rows, WIDTH, generator=generator).to(dtype)
    x[0, 0] = 0.0  # eps alone
    x[0, 1] *= 1e-3
    return norm, x


@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 0.0)]
)
def test_rms_norm_is_torchs(dtype: torch.dtype, tolerance: float, num_rows: int) -> None:
    norm, x = norm_and_input(dtype, num_rows)
    before = x.clone()
    expected = F.rms_norm(x, (WIDTH,), norm.weight, norm.eps)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected, rtol=0, atol=tolerance)
        swapped = norm(x.transpose(0, 1).contiguous().transpose(0, 1))
        torch.testing.assert_close(swapped, expected, rtol=0, atol=tolerance)
        unweighted = F.rms_norm(x, (WIDTH,), None, norm.eps)
        torch.testing.assert_close(rms_norm(x, None, eps=norm.eps), unweighted, rtol=0, atol=4 * tolerance)
    assert torch.equal(norm(x), expected), "with gradients it is torch's own"
    assert torch.equal(x, before)


@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_gelu_is_torchs(dtype: torch.dtype, tolerance: float, num_rows: int) -> None:
    x = 4 * norm_and_input(dtype, num_rows)[1]
    before = x.clone()
    expected = F.gelu(x, approximate="tanh")
    with torch.no_grad():
        torch.testing.assert_close(gelu(x), expected, rtol=0, atol=tolerance)
    assert torch.equal(gelu(x), expected), "with gradients it is torch's own"
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("function", "operation"),
    [(lambda x: rms_norm(x, None, eps=1e-5), "aten::linalg_vector_norm"), (gelu, "aten::addcmul")],
    ids=["rms_norm", "gelu"],
)
def test_many_numbers_take_the_own_form_where_nothing_is_recorded(
    function: Callable[[Tensor], Tensor], operation: str
) -> None:
    def operations(num_rows: int) -> set[str]:
        x = norm_and_input(torch.float32, num_rows)[1]
        with torch.profiler.profile() as profile:
            function(x)
        return {event.key for event in profile.key_averages()}

    assert operation not in operations(MANY)
    with torch.no_grad():
        assert operation in operations(MANY) and operation not in operations(FEW)
    with torch.inference_mode():
        assert operation in operations(MANY)
