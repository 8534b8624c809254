"""State-space duality: the chunked plain path against the definition, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.ops.operation import ImplementationUnavailable, Operation
from archs.ops.selective_scan import selective_scan
from archs.ops.ssd import OPERATION, STEP_OPERATION, ssd
from archs.ops.ssd import plain as plain_module

BATCH, HEADS, HEAD_WIDTH, GROUPS, STATE = 2, 4, 3, 2, 5
CHUNK = 16


def make_inputs(num_tokens: int, *, step: float = 0.1, groups: int = GROUPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sequence = (BATCH, num_tokens)
    dt = step * torch.rand(*sequence, HEADS, generator=generator, dtype=torch.float64)
    decay_rates = -torch.arange(1, HEADS + 1, dtype=torch.float64)
    maps = [normal(*sequence, groups, STATE), normal(*sequence, groups, STATE)]
    state = normal(BATCH, HEADS, HEAD_WIDTH, STATE)
    return [normal(*sequence, HEADS, HEAD_WIDTH), dt, decay_rates, *maps, normal(HEADS), state]


def test_the_reference_is_a_selective_scan_with_tied_decays() -> None:
    """arXiv 2405.21060, section 2: one head and group is Mamba's recurrence with A scalar."""
    x, dt, A, B, C, D, state = make_inputs(20, groups=1)
    y, last = ssd(x, dt, A, B, C, D, state, implementation="reference")
    for head in range(HEADS):
        expected, expected_last = selective_scan(
            x[:, :, head],
            dt[:, :, head, None].expand(-1, -1, HEAD_WIDTH),
            A[head].expand(HEAD_WIDTH, STATE),
            B[:, :, 0],
            C[:, :, 0],
            D[head].expand(HEAD_WIDTH),
            state[:, head],
            implementation="reference",
        )
        torch.testing.assert_close(y[:, :, head], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(last[:, head], expected_last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_elements", [1, 3 * BATCH * HEADS * CHUNK**2])
def test_blocks_do_not_change_the_result(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(130)
    expected = ssd(*inputs, chunk_tokens=CHUNK)
    monkeypatch.setattr(plain_module, "BLOCK_ELEMENTS", block_elements)
    for one, other in zip(ssd(*inputs, chunk_tokens=CHUNK), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_products_cost_what_the_paper_counts(num_chunks: int) -> None:
    """2 Q N G + 2 Q D + 4 N D a token (arXiv 2405.21060, section 6), seen by the counter."""
    inputs = make_inputs(num_chunks * CHUNK)
    with FlopCounterMode(display=False) as counter:
        ssd(*inputs, chunk_tokens=CHUNK, implementation="plain")
    width = HEADS * HEAD_WIDTH
    a_token = 2 * CHUNK * STATE * GROUPS + 2 * CHUNK * width + 4 * STATE * width
    assert counter.get_total_flops() == BATCH * num_chunks * CHUNK * a_token


@pytest.mark.parametrize("operation", [OPERATION, STEP_OPERATION], ids=lambda operation: operation.name)
def test_mamba_ssm_says_what_it_needs(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImplementationUnavailable, match="cuda only"):
        operation.resolve("mamba_ssm", torch.device("cpu"))
    monkeypatch.setattr("archs.ops.operation._is_installed", lambda package: False)
    with pytest.raises(ImplementationUnavailable, match="pip install 'longarch\\[mamba-ssm\\]'"):
        operation.resolve("mamba_ssm", torch.device("cuda"))
