"""Attention: the implementations agree, whatever the window, the tokens outside it and the blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn.attention.bias import CausalVariant

from archs.ops.attention import OPERATION, STEP_OPERATION, attention, attention_step, sdpa
from archs.ops.operation import ImplementationUnavailable, Operation


def random_qkv(num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads on two of keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, num_queries, 4, 8), (2, num_keys, 2, 8), (2, num_keys, 2, 8))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def test_a_long_window_and_a_long_continuation_are_cut_into_blocks() -> None:
    q, k, v = random_qkv(1100, 1200)
    for window_tokens in (None, 1050):
        y, expected = (
            attention(q, k, v, window_tokens=window_tokens, implementation=name) for name in ("sdpa", "plain")
        )
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(2, 3), (63, 65), (64, 201), (17, 140), (65, 66)])
def test_a_continuation_through_the_flash_kernel(
    num_queries: int, num_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU in half precision is asked for. A CPU has no such kernel, and torch makes the mask there."""
    asked = []

    def can_use(params: SDPAParams) -> bool:
        asked.append((tuple(params.query.shape), tuple(params.key.shape), params.enable_gqa))
        return True

    monkeypatch.setattr(sdpa, "can_use_flash_attention", can_use)
    results = []
    for name in ("sdpa", "reference"):
        leaves = [tensor.requires_grad_() for tensor in random_qkv(num_queries, num_keys)]
        y = attention(*leaves, implementation=name)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert asked == [((2, 4, num_queries, 8), (2, 2, num_keys, 8), True)]


def test_a_continuation_needs_no_room_for_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own is a tensor of 2 C S floats."""
    biases = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *_, attn_mask, **__: biases.append(attn_mask)
    )
    q, k = torch.empty(1, 4, 2**14, 8, device="meta"), torch.empty(1, 2, 2**20, 8, device="meta")
    sdpa.lower_right(q, k, k)
    (bias,) = biases
    assert (bias.seq_len_q, bias.seq_len_kv) == (2**14, 2**20)
    assert bias.variant == CausalVariant.LOWER_RIGHT and bias.untyped_storage().nbytes() < 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(2, 3), (63, 200), (1100, 3000)])
def test_a_continuation_on_a_gpu(num_kv_heads: int, num_queries: int, num_keys: int) -> None:
    q, k, v = random_qkv(num_queries, num_keys)
    heads = torch.arange(num_kv_heads) % k.shape[2]
    inputs = [tensor.to("cuda", torch.bfloat16) for tensor in (q, k[:, :, heads], v[:, :, heads])]
    results = []
    for name, dtype in (("sdpa", torch.bfloat16), ("plain", torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        y = attention(*leaves, implementation=name)
        weights = torch.linspace(-1, 1, y.numel(), device="cuda").bfloat16().to(dtype).view(y.shape)
        results.append([y, *torch.autograd.grad(y, leaves, weights)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("implementation", ["plain", "sdpa", "reference"])
@pytest.mark.parametrize("num_seen", [1, 2, 64, 65])
def test_a_step_sees_the_first_keys_of_a_cache(implementation: str, num_seen: int) -> None:
    q, k, v = random_qkv(1, 65)
    expected = attention(q, k[:, :num_seen], v[:, :num_seen], implementation="reference")
    k[:, num_seen:] = 1e3  # what lies beyond must not matter
    y = attention_step(q[:, 0], k, v, torch.tensor([num_seen]), implementation=implementation)
    torch.testing.assert_close(y, expected[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("operation", [OPERATION, STEP_OPERATION], ids=lambda operation: operation.name)
def test_flash_attn_says_what_it_needs(
    operation: Operation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install = r"pip install 'longarch\[flash-attn\]'"
    monkeypatch.setattr("archs.ops.operation._is_installed", lambda package: False)
    with pytest.raises(ImplementationUnavailable, match=f"cuda only.*{install}"):
        operation.resolve("flash_attn", torch.device("cpu"))
    with pytest.raises(ImplementationUnavailable, match=f"not installed.*{install}"):
        operation.resolve("flash_attn", torch.device("cuda"))
    monkeypatch.setattr("archs.ops.operation._is_installed", lambda package: True)
    (tmp_path / "flash_attn").mkdir()  # as where another version of it is there
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(ImplementationUnavailable, match=f"cannot be imported.*flash_attn anew: .*{install}"):
        operation.function("flash_attn", torch.device("cuda"))
    monkeypatch.delitem(sys.modules, "flash_attn")
