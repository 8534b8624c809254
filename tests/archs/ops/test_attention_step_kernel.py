"""One query against a cache in Triton, against the definition in float64: values, slices and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archs.ops.attention import STEP_OPERATION, attention_step, kernel_step

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, small sizes take several tiles and slices."""
    if not HAS_GPU:
        monkeypatch.setattr(kernel_step, "TILE_BYTES", 1)


def make_inputs(
    sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the attention mixer has them: a head's keys in one piece."""
    batch, heads, kv_heads, width, slots = sizes
    generator = torch.Generator().manual_seed(slots)
    q = 3 * torch.randn(batch, heads, width, generator=generator)
    k, v = (torch.randn(batch, kv_heads, slots, width, generator=generator) for _ in range(2))
    q, k, v = (tensor.to(device, dtype) for tensor in (q, k, v))
    return q, k.transpose(1, 2), v.transpose(1, 2)


def run(q: Tensor, k: Tensor, v: Tensor, num_seen: int, implementation: str = "triton") -> Tensor:
    return attention_step(q, k, v, torch.tensor([num_seen], device=q.device), implementation=implementation)


def run_reference(q: Tensor, k: Tensor, v: Tensor, num_seen: int) -> Tensor:
    return run(*(tensor.to("cpu", torch.float64) for tensor in (q, k, v)), num_seen, "reference")


@pytest.mark.parametrize("num_seen", [5, 33])
def test_any_layout_of_the_cache(
    num_seen: int, kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    """A ring's, a token's heads in one piece; a part of a longer cache; and a head's width cut in pieces."""
    q, k, v = make_inputs((2, 4, 2, 24, 33), kernel_device)
    expected = run_reference(q, k, v, num_seen)
    longer = [torch.cat((tensor, tensor), dim=1)[:, :33] for tensor in (k, v)]
    wide = torch.cat((q, q), dim=-1)[..., :24]
    for tensors in ((q, k.contiguous(), v.contiguous()), (wide, *longer), (q, k.mT.contiguous().mT, v)):
        assert_kernel_close(run(*tensors, num_seen), expected, torch.float32)


def test_scores_of_any_size(kernel_device: torch.device, assert_kernel_close: Callable[..., None]) -> None:
    """The largest of thousands stands in one slice alone, and all others have no weight beside it."""
    q, k, v = make_inputs((1, 2, 2, 16, 90), kernel_device)
    q, k = 1e3 * q, k.contiguous()
    for peak in (0, 40, 89):
        k[:, peak] = 1e2 * q
        y = run(q, k, v, 90)
        assert_kernel_close(y, v[:, peak].cpu(), torch.float32)
        k[:, peak] = 0


def test_a_query_may_have_another_dtype_than_the_cache(
    kernel_device: torch.device, assert_kernel_close: Callable[..., None]
) -> None:
    """Under autocast the cache is in the weights' float32."""
    q, k, v = make_inputs((2, 6, 2, 16, 90), kernel_device)
    q = q.bfloat16()
    y = run(q, k, v, 75)
    assert y.dtype == torch.bfloat16
    assert_kernel_close(y, run_reference(q, k, v, 75), torch.bfloat16)


@pytest.mark.parametrize(
    ("num_key_heads", "num_tiles", "expected"),
    [(1, 10**6, 528), (12, 1024, 44), (12, 3, 3), (768, 1024, 1), (512, 1024, 1)],
)
def test_slices_fill_the_card_once(num_key_heads: int, num_tiles: int, expected: int) -> None:
    assert kernel_step.slices_of(num_key_heads, num_tiles, 132) == expected


@pytest.mark.parametrize(
    ("width", "element_size", "expected"), [(16, 2, 128), (64, 2, 64), (128, 4, 16), (512, 4, 16)]
)
def test_tiles_have_room_for_a_product(
    width: int, element_size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_step, "TILE_BYTES", 8192)
    assert kernel_step.tile_tokens(width, element_size) == expected


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_one_graph_serves_every_length(assert_kernel_close: Callable[..., None]) -> None:
    q, k, v = make_inputs((2, 8, 2, 64, 1000), torch.device("cuda"), torch.bfloat16)
    num_seen = torch.ones(1, dtype=torch.int64, device="cuda")
    attention_step(q, k, v, num_seen, implementation="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attention_step(q, k, v, num_seen, implementation="triton")
    for length in (1, 63, 1000):
        num_seen.fill_(length)
        graph.replay()
        assert_kernel_close(y, run_reference(q, k, v, length), torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_names_what_a_card_has_run(device: str) -> None:
    assert STEP_OPERATION.resolve("auto", torch.device(device)) == "sdpa"
