"""The selective scan: the plain path against the definition, in values, gradients, memory and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable, Operation
from archs.ops.selective_scan import OPERATION, STEP_OPERATION, selective_scan
from archs.ops.selective_scan import plain as plain_module

BATCH, CHANNELS, STATE = 2, 5, 3


def make_inputs(num_tokens: int, *, step: float = 0.1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    sequence = (BATCH, num_tokens)
    dt = step * torch.rand(*sequence, CHANNELS, generator=generator, dtype=dtype)
    decay_rates = -torch.arange(1, STATE + 1, dtype=dtype).repeat(CHANNELS, 1)
    tensors = [
        normal(*sequence, CHANNELS),
        dt,
        decay_rates,
        normal(*sequence, STATE),
        normal(*sequence, STATE),
    ]
    return [*tensors, normal(CHANNELS), normal(BATCH, CHANNELS, STATE)]


def test_two_tokens_by_hand() -> None:
    def number(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    x, dt = number(3.0, 5.0).reshape(1, 2, 1), number(0.5, 2.0).reshape(1, 2, 1)
    B, C = number(7.0, 11.0).reshape(1, 2, 1), number(13.0, 17.0).reshape(1, 2, 1)
    first = 0.5 * 7.0 * 3.0
    second = number(-2.0).exp() * first + 2.0 * 11.0 * 5.0
    expected = torch.stack((number(13.0 * first + 19.0 * 3.0), 17.0 * second + 19.0 * 5.0), dim=1)[..., None]
    for implementation in ("reference", "plain"):
        y, state = selective_scan(
            x, dt, number(-1.0).reshape(1, 1), B, C, number(19.0), implementation=implementation
        )
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(state, second.reshape(1, 1, 1), rtol=1e-12, atol=0)


def test_gradients_hold_against_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_module, "MAX_CHUNK_TOKENS", 2)
    monkeypatch.setattr(plain_module, "MIN_CHUNK_TOKENS", 2)
    inputs = tuple(tensor.requires_grad_() for tensor in make_inputs(5))
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args, implementation="plain"), inputs)


def test_training_keeps_far_less_than_every_state() -> None:
    num_tokens, channels, width = 512, 64, 16
    scan_elements = num_tokens * channels * width
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    x, B = torch.randn(1, num_tokens, channels, requires_grad=True), torch.randn(1, num_tokens, width)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        selective_scan(x, torch.rand_like(x), -torch.rand(channels, width), B, B, torch.ones(channels))
    assert 0 < sum(kept.values()) < scan_elements / 4


@pytest.mark.parametrize("operation", [OPERATION, STEP_OPERATION], ids=lambda operation: operation.name)
def test_mamba_ssm_says_what_it_needs(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImplementationUnavailable, match="cuda only"):
        operation.resolve("mamba_ssm", torch.device("cpu"))
    monkeypatch.setattr("archs.ops.operation._is_installed", lambda package: False)
    with pytest.raises(ImplementationUnavailable, match="pip install 'longarch\\[mamba-ssm\\]'"):
        operation.resolve("mamba_ssm", torch.device("cuda"))
