"""The chunked loss: the numbers of the plain one, in a chunk's memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.cross_entropy import MAX_CHUNK_LOGITS, MAX_CHUNK_TOKENS, chunked_cross_entropy
from harness.measure.memory import PeakMemory

CPU = torch.device("cpu")
BATCH, NUM_TOKENS, WIDTH, VOCAB = 2, 33, 12, 50


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """Features, head, targets and weights, some of them zero."""
    torch.manual_seed(0)
    features = torch.randn(BATCH, NUM_TOKENS, WIDTH, dtype=dtype).requires_grad_()
    head = nn.Linear(WIDTH, VOCAB, bias=False).to(dtype)
    targets = torch.randint(0, VOCAB, (BATCH, NUM_TOKENS))
    weights = torch.rand(BATCH, NUM_TOKENS, dtype=dtype) * (torch.rand(BATCH, NUM_TOKENS) > 0.3)
    return features, head, targets, weights


def plain(features: Tensor, head: nn.Module, targets: Tensor, weights: Tensor | None) -> Tensor:
    logits = head(features).flatten(0, 1)
    nll = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return nll.mean() if weights is None else (nll * weights.flatten()).sum() / weights.sum()


@pytest.mark.parametrize("chunk_tokens", [1, 7, 65, 66, None])
@pytest.mark.parametrize("is_weighted", [True, False], ids=["weighted", "mean"])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    chunk_tokens: int | None, is_weighted: bool
) -> None:
    features, head, targets, weights = inputs()
    weights = weights if is_weighted else None
    expected = plain(features, head, targets, weights)
    expected_gradients = torch.autograd.grad(3 * expected, (features, head.weight))
    loss = chunked_cross_entropy(features, head, targets, weights, chunk_tokens)
    gradients = torch.autograd.grad(3 * loss, (features, head.weight))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-13)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-13)
    with torch.no_grad():
        loss = chunked_cross_entropy(features, head, targets, weights, chunk_tokens)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("frozen", ["features", "head"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    features, head, targets, weights = inputs()
    (features if frozen == "features" else head.weight).requires_grad_(False)
    chunked_cross_entropy(features, head, targets, weights, 7).backward()
    learned, still = (head.weight, features) if frozen == "features" else (features, head.weight)
    assert still.grad is None and learned.grad is not None
    (expected,) = torch.autograd.grad(plain(features, head, targets, weights), learned)
    torch.testing.assert_close(learned.grad, expected, rtol=0, atol=1e-13)


def test_a_head_of_another_kind_is_chunked_too() -> None:
    features, head, targets, weights = inputs()
    other = nn.Sequential(head, nn.Tanh())
    expected = torch.autograd.grad(plain(features, other, targets, weights), (features, head.weight))
    loss = chunked_cross_entropy(features, other, targets, weights, 7)
    for gradient, one in zip(torch.autograd.grad(loss, (features, head.weight)), expected, strict=True):
        torch.testing.assert_close(gradient, one, rtol=0, atol=1e-13)


def test_mixed_precision_is_as_near_as_plain_mixed_precision() -> None:
    features, head, targets, weights = inputs(torch.float32)
    exact = [
        t.double()
        for t in torch.autograd.grad(plain(features, head, targets, weights), (features, head.weight))
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [
            plain(features, head, targets, weights),
            chunked_cross_entropy(features, head, targets, weights, 7),
        ]
    errors = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, (features, head.weight))
        assert [g.dtype for g in gradients] == [torch.float32] * 2
        errors.append([((g - e).norm() / e.norm()).item() for g, e in zip(gradients, exact, strict=True)])
    for error, other in zip(*reversed(errors), strict=True):
        assert error < max(2 * other, 1e-2)
    assert abs(losses[1] - losses[0]) < 1e-2


def test_small_logits_take_the_plain_path_and_large_ones_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the plain path was expected")

    monkeypatch.setattr("archs.cross_entropy.LinearCrossEntropy.apply", refuse)
    features, targets = (
        torch.zeros(1, MAX_CHUNK_TOKENS, 1),
        torch.zeros(1, MAX_CHUNK_TOKENS, dtype=torch.int64),
    )
    assert chunked_cross_entropy(features, nn.Linear(1, 257, bias=False), targets) > 0
    wide = nn.Linear(1, 2 * MAX_CHUNK_LOGITS // MAX_CHUNK_TOKENS, bias=False)
    with pytest.raises(AssertionError, match="plain path"):
        chunked_cross_entropy(features, wide, targets)


def test_memory_is_that_of_a_chunk_and_of_the_gradients() -> None:
    num_tokens, vocab_size, chunk_tokens, width = 2048, 4096, 128, 16
    features = torch.randn(1, num_tokens, width).requires_grad_()
    head = nn.Linear(width, vocab_size, bias=False)
    targets = torch.randint(0, vocab_size, (1, num_tokens))
    peaks = []
    for size in (num_tokens, chunk_tokens):
        with PeakMemory(CPU) as memory:
            chunked_cross_entropy(features, head, targets, None, size).backward()
        peaks.append(memory.bytes)
        features.grad = head.weight.grad = None
    gradients = 4 * width * (num_tokens + vocab_size)
    assert peaks[0] >= 2 * 4 * num_tokens * vocab_size, "all logits, and their gradient"
    assert peaks[1] <= 4 * 4 * chunk_tokens * vocab_size + 4 * gradients
