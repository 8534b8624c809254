"""Perplexity of models whose loss is known."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.base import Measurement, TaskInputs
from tasks.perplexity import Perplexity, bucket_edges, pick_documents
from tests.tasks.conftest import ReaderModel


class CountingModel(ReaderModel):
    """Its loss depends on how many tokens it has seen: 1 nat plus 1 / that number."""

    def logits_after(self, seen: list[int]) -> Tensor:
        # p of each of 256 bytes alike; the rest of the probability is on the document start.
        probability = math.exp(-(1 + 1 / len(seen)) - math.log(256))
        logits = torch.full((self.vocab_size,), math.log(probability))
        logits[256] = math.log(1 - 256 * probability)
        return logits


def measure(inputs: TaskInputs, model: ReaderModel, context_tokens: int, **settings: Any) -> Measurement:
    defaults: dict[str, Any] = {"context_lengths_tokens": [8, 64], "num_documents": 4, "chunk_tokens": 5}
    task = Perplexity(**{**defaults, **settings})
    task.prepare(inputs)
    return task.measure(model, {"context_tokens": context_tokens})


def test_a_model_that_prefers_nothing_needs_the_logarithm_of_the_vocabulary(inputs: TaskInputs) -> None:
    result = measure(inputs, ReaderModel(), 64)
    assert result.metrics["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)
    assert result.metrics["bits_per_byte_low"] == pytest.approx(math.log2(257), rel=1e-6)
    assert result.metrics["perplexity"] == pytest.approx(257, rel=1e-5)
    assert result.metrics["num_documents"] == 4 and result.metrics["num_tokens"] == 4 * 64
    assert result.samples["document_bytes"] == [64] * 4
    assert result.details["adaptation"] is None


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
@pytest.mark.parametrize("context_tokens", [8, 64])
def test_every_window_begins_anew_and_every_byte_is_scored_once(
    inputs: TaskInputs, context_tokens: int, chunk_tokens: int
) -> None:
    result = measure(inputs, CountingModel(), context_tokens, chunk_tokens=chunk_tokens, num_buckets=64)
    in_window = sum(1 + math.log(256) + 1 / seen for seen in range(1, context_tokens + 1))
    expected = in_window * 64 / context_tokens
    assert result.samples["document_nll_nats"] == pytest.approx([expected] * 4, rel=1e-6)
    starts, losses = result.samples["bucket_start_tokens"], result.samples["bucket_loss_nats"]
    assert losses[0] == pytest.approx(2 + math.log(256), rel=1e-6)
    assert starts[1] == 1 and losses[1] == pytest.approx(1.5 + math.log(256), rel=1e-6)


def test_a_length_that_does_not_divide_the_text_still_scores_all_of_it(inputs: TaskInputs) -> None:
    result = measure(inputs, CountingModel(), 24, context_lengths_tokens=[24, 64])
    nats = [sum(1 + math.log(256) + 1 / seen for seen in range(1, n + 1)) for n in (24, 24, 16)]
    assert result.samples["document_nll_nats"] == pytest.approx([sum(nats)] * 4, rel=1e-6)
    assert result.metrics["num_tokens"] == 4 * 64


def test_the_batch_and_its_chunks_do_not_change_the_result(inputs: TaskInputs, new_model: Any) -> None:
    model = new_model("transformer")
    results = [
        measure(inputs, model, 8, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens)
        for batch_tokens, chunk_tokens in ((1, 3), (24, 8), (4096, 64))
    ]
    for result in results[1:]:
        assert result.samples["document_nll_nats"] == pytest.approx(
            results[0].samples["document_nll_nats"], rel=1e-5
        )
        assert result.samples["bucket_loss_nats"] == pytest.approx(
            results[0].samples["bucket_loss_nats"], rel=1e-5
        )


def test_memory_does_not_grow_with_the_document(inputs: TaskInputs) -> None:
    model = ReaderModel()
    measure(inputs, model, 64, chunk_tokens=16)
    assert model.largest_chunk_tokens == 16


def test_scores_agree_with_the_full_forward(inputs: TaskInputs, new_model: Any) -> None:
    model = new_model("transformer")
    result = measure(inputs, model, 64, num_documents=1)
    split = inputs.corpus.test
    index = pick_documents(split, min_tokens=65, num_documents=1)[0]
    tokens = torch.from_numpy(split.document(index)[:65].astype(np.int64))[None]
    assert tokens[0, 0] == inputs.tokenizer.document_start_id
    with torch.no_grad():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert result.samples["document_nll_nats"][0] == pytest.approx(64 * loss, rel=1e-5)
    assert result.metrics["bits_per_byte_low"] is None  # one document says nothing of a spread


def test_an_adaptive_model_uses_the_expert_of_the_domain(inputs: TaskInputs) -> None:
    model = ReaderModel(is_adaptive=True)
    result = measure(inputs, model, 8, batch_tokens=4096)
    assert set(model.choices) == {"programs", "stories"}
    assert result.details["adaptation"] == "expert of the document's domain"
    assert set(result.details["domains"]) == {"programs", "stories"}


def test_documents_are_spread_over_the_domains(inputs: TaskInputs) -> None:
    split = inputs.corpus.test
    domains = [split.domains[i] for i in pick_documents(split, min_tokens=100, num_documents=4)]
    assert sorted(domains) == ["programs", "programs", "stories", "stories"]
    everything = pick_documents(split, min_tokens=100, num_documents=100)
    assert sorted(everything) == list(range(split.num_documents))


def test_documents_shorter_than_the_context_are_named(inputs: TaskInputs) -> None:
    name, tokens = inputs.corpus.test.longest
    task = Perplexity(context_lengths_tokens=[100_000])
    with pytest.raises(
        ValueError, match=rf"a context of 100000 needs; the longest is {name} with {tokens}\.$"
    ):
        task.prepare(inputs)


@pytest.mark.parametrize(
    "settings",
    [
        {"context_lengths_tokens": [0]},
        {"context_lengths_tokens": [64, -1]},
        {"context_lengths_tokens": []},
        {"context_lengths_tokens": [64], "num_documents": 0},
        {"context_lengths_tokens": [64], "batch_tokens": 0},
        {"context_lengths_tokens": [64], "chunk_tokens": -5},
        {"context_lengths_tokens": [64], "num_buckets": 0},
    ],
)
def test_numbers_that_are_not_positive_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"must be positive|at least one"):
        Perplexity(**settings)


@pytest.mark.parametrize("context_tokens", [1, 2, 63, 64, 65, 4096])
@pytest.mark.parametrize("num_buckets", [1, 2, 12])
def test_buckets_cover_every_position_once(context_tokens: int, num_buckets: int) -> None:
    edges = bucket_edges(context_tokens, num_buckets)
    assert edges[0] == 0 and edges[-1] == context_tokens and len(edges) <= num_buckets + 1
    assert all(a < b for a, b in pairwise(edges))


def test_cells_and_results_do_not_depend_on_the_order_measured(inputs: TaskInputs) -> None:
    task = Perplexity(context_lengths_tokens=[16, 8], num_documents=2)
    assert task.cells() == [{"context_tokens": 8}, {"context_tokens": 16}]
    task.prepare(inputs)
    first = task.measure(CountingModel(), {"context_tokens": 8})
    task.measure(CountingModel(), {"context_tokens": 16})
    again = task.measure(CountingModel(), {"context_tokens": 8})
    assert dataclasses.asdict(first) == dataclasses.asdict(again)
