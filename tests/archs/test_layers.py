"""Building blocks that have a form of their own beside torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from archs.layers import MANY, RMSNorm


def norm_and_input(dtype: torch.dtype, num_rows: int) -> tuple[RMSNorm, Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(48, eps=1e-5).to(dtype)
    norm.weight.data = torch.rand(48, generator=generator).to(dtype)
    x = torch.randn(2, num_rows, 48, generator=generator).to(dtype)
    x[0, 0] = 0.0  # eps alone
    x[0, 1] *= 1e-3
    return norm, x


@pytest.mark.parametrize("num_rows", [3, MANY // 96 + 1], ids=["few", "many"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 0.0)]
)
def test_rms_norm_is_torchs(dtype: torch.dtype, tolerance: float, num_rows: int) -> None:
    norm, x = norm_and_input(dtype, num_rows)
    before = x.clone()
    expected = F.rms_norm(x, (48,), norm.weight, norm.eps)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected, rtol=0, atol=tolerance)
    assert torch.equal(norm(x), expected), "with gradients it is torch's own"
    assert torch.equal(x, before)


def test_many_numbers_take_the_own_form_where_no_gradient_is_asked_for() -> None:
    norm, x = norm_and_input(torch.float32, MANY // 96 + 1)
    with torch.no_grad(), torch.profiler.profile() as profile:
        norm(x)
    assert "aten::linalg_vector_norm" in {event.key for event in profile.key_averages()}
