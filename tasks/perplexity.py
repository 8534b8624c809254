"""Measure bits per byte and perplexity of real documents, by context length and by position.

The same text is scored at every context length: the first max(context_lengths_tokens) tokens of each
document, cut into windows. Each window begins from an empty state. From one length to the next, only the
amount of past that the model can use changes.

Metrics of a point (cell: context_tokens):
    bits_per_byte                          of all scored text
    bits_per_byte_low, bits_per_byte_high  95% BCa bootstrap interval over documents; null for one document
    perplexity                             exp of the mean loss per token
    num_documents, num_tokens              number of scored documents and tokens
Samples, one per document: document_nll_nats, document_bytes, document_tokens.
Samples, one per bucket of positions: bucket_start_tokens, bucket_end_tokens (exclusive), and
bucket_loss_nats, the mean loss of the tokens whose window holds between start and end earlier tokens.
Details: domains (bits per byte of each), adaptation (which expert an adaptive model used, or null).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from archs.base import SequenceModel
from archs.generate import score_text
from harness.measure.statistics import ratio_interval
from harness.record.metrics import Metric
from tasks.base import Measurement, Task, TaskInputs, require_positive, with_interval
from tasks.data.corpus import Split


class Window(NamedTuple):
    """Targets [start, start + length) of a document. Target 0 is the document's second token."""

    document: int
    start: int
    length: int


class Perplexity(Task):
    """The task of this module.

    context_lengths_tokens: window lengths.
    num_documents: documents of the test split to score, taken from the domains in turn; fewer where fewer are
                   long enough.
    num_buckets:   largest number of buckets of positions.
    batch_tokens:  tokens scored in one batch, which has at least one window.
    chunk_tokens:  tokens per prefill call; memory does not grow with the window.
    Raises ValueError where a number is not positive.
    """

    name = "perplexity"
    METRICS = (
        *with_interval(
            Metric(
                name="bits_per_byte",
                label="bits per byte",
                unit="bits/byte",
                direction="lower",
                kind="quality",
                tolerance=0.05,
                is_headline=True,
            )
        ),
        Metric(name="perplexity", label="perplexity", unit="", direction="lower", kind="quality"),
        Metric(name="num_documents", label="documents", unit="", direction="neither", kind="quality"),
        Metric(name="num_tokens", label="tokens", unit="tokens", direction="neither", kind="quality"),
    )
    # The context lengths do more than choose cells: the longest decides which text is scored.
    CELL_SETTINGS = ()

    def __init__(
        self,
        *,
        context_lengths_tokens: Sequence[int],
        num_documents: int = 16,
        num_buckets: int = 12,
        batch_tokens: int = 8192,
        chunk_tokens: int = 1024,
    ) -> None:
        if not context_lengths_tokens:
            raise ValueError("context_lengths_tokens=[] needs at least one length.")
        for length in context_lengths_tokens:
            require_positive("tasks.perplexity", context_lengths_tokens=length)
        require_positive("tasks.perplexity", num_documents=num_documents, num_buckets=num_buckets)
        require_positive("tasks.perplexity", batch_tokens=batch_tokens, chunk_tokens=chunk_tokens)
        self.context_lengths_tokens = sorted(set(context_lengths_tokens))
        self.num_documents, self.num_buckets = num_documents, num_buckets
        self.batch_tokens, self.chunk_tokens = batch_tokens, chunk_tokens

    def cells(self) -> list[dict[str, Any]]:
        return [{"context_tokens": length} for length in self.context_lengths_tokens]

    def prepare(self, inputs: TaskInputs) -> None:
        """Pick the documents.

        Raises ValueError where no test document is as long as the longest context."""
        self._device, self._seed = inputs.device, inputs.seed
        split, num_tokens = inputs.corpus.test, self.context_lengths_tokens[-1]
        documents = pick_documents(split, min_tokens=num_tokens + 1, num_documents=self.num_documents)
        self._domains = [split.domains[i] for i in documents]
        self._bytes = [split.num_bytes(i, 1, num_tokens + 1) for i in documents]
        rows = [split.document(i)[: num_tokens + 1].astype(np.int64) for i in documents]
        self._tokens = torch.from_numpy(np.stack(rows))  # (documents, tokens + 1)

    @torch.no_grad()
    def measure(self, model: SequenceModel, cell: dict[str, Any]) -> Measurement:
        context_tokens = cell["context_tokens"]
        losses = np.full((len(self._domains), self.context_lengths_tokens[-1]), np.nan)
        for batch in self._batches(context_tokens, by_domain=model.is_adaptive):
            batch_losses = self._score(model, batch).double().cpu().numpy()
            for window, row in zip(batch, batch_losses, strict=True):
                losses[window.document, window.start : window.start + window.length] = row
        return self._summary(losses, context_tokens, is_adaptive=model.is_adaptive)

    def _batches(self, context_tokens: int, *, by_domain: bool) -> Iterator[list[Window]]:
        """Yield batches of windows of equal length (and domain). Every token is in exactly one window."""
        num_tokens = self._tokens.shape[1] - 1
        groups: dict[tuple[int, str], list[Window]] = {}
        for document, domain in enumerate(self._domains):
            for start in range(0, num_tokens, context_tokens):
                length = min(context_tokens, num_tokens - start)
                key = (length, domain if by_domain else "")
                groups.setdefault(key, []).append(Window(document, start, length))
        for (length, _), windows in groups.items():
            num_rows = max(1, self.batch_tokens // length)
            for first in range(0, len(windows), num_rows):
                yield windows[first : first + num_rows]

    def _score(self, model: SequenceModel, batch: list[Window]) -> Tensor:
        """Return the loss in nats of every target of the windows (rows, length)."""
        length = batch[0].length
        rows = torch.stack([self._tokens[w.document, w.start : w.start + length + 1] for w in batch])
        state = model.init_state(len(batch), length)
        state = model.select_domain(self._domains[batch[0].document], state)
        return score_text(model, rows.to(self._device), state, chunk_tokens=self.chunk_tokens)

    def _summary(self, losses: np.ndarray, context_tokens: int, *, is_adaptive: bool) -> Measurement:
        document_nats = losses.sum(axis=1)
        nats_per_byte = float(document_nats.sum() / sum(self._bytes))
        interval = ratio_interval(document_nats.tolist(), self._bytes, seed=self._seed)
        low, high = (None, None) if interval is None else (value / math.log(2) for value in interval)
        domains = {}
        for domain in sorted(set(self._domains)):
            rows = [row for row, name in enumerate(self._domains) if name == domain]
            num_bytes = sum(self._bytes[row] for row in rows)
            domains[domain] = float(document_nats[rows].sum()) / num_bytes / math.log(2)
        mean_nats = float(losses.mean())
        edges = bucket_edges(context_tokens, self.num_buckets)
        positions = np.arange(losses.shape[1]) % context_tokens
        buckets = [(positions >= a) & (positions < b) for a, b in pairwise(edges)]
        return Measurement(
            metrics={
                "bits_per_byte": nats_per_byte / math.log(2),
                "bits_per_byte_low": low,
                "bits_per_byte_high": high,
                "perplexity": math.exp(mean_nats) if mean_nats < 700 else math.inf,
                "num_documents": len(self._domains),
                "num_tokens": int(losses.size),
            },
            samples={
                "document_nll_nats": document_nats.tolist(),
                "document_bytes": list(self._bytes),
                "document_tokens": [losses.shape[1]] * len(self._domains),
                "bucket_start_tokens": edges[:-1],
                "bucket_end_tokens": edges[1:],
                "bucket_loss_nats": [float(losses[:, bucket].mean()) for bucket in buckets],
            },
            details={
                "domains": domains,
                "adaptation": "expert of the document's domain" if is_adaptive else None,
            },
        )


def bucket_edges(context_tokens: int, num_buckets: int) -> list[int]:
    """Return rising whole edges from 0 to context_tokens, evenly spaced in the logarithm of the position.

    There are num_buckets + 1 of them, or fewer where rounding makes some equal."""
    if num_buckets == 1:
        return [0, context_tokens]
    inner = np.rint(np.geomspace(1, context_tokens, num_buckets)).astype(int).tolist()
    return sorted({0, *inner, context_tokens})


def pick_documents(split: Split, *, min_tokens: int, num_documents: int) -> list[int]:
    """Return the indices of documents of at least min_tokens tokens.

    The domains take turns. Within a domain, the order is that of a hash of the names. Raises ValueError where
    no document is long enough."""
    queues: dict[str, list[int]] = {}
    for index in np.flatnonzero(split.lengths_tokens >= min_tokens).tolist():
        queues.setdefault(split.domains[index], []).append(index)
    if not queues:
        name, tokens = split.longest
        raise ValueError(
            f"No document of the {split.name} split has the {min_tokens} tokens that a context of "
            f"{min_tokens - 1} needs; the longest is {name} with {tokens}."
        )
    for queue in queues.values():
        queue.sort(key=lambda i: hashlib.sha256(split.names[i].encode()).digest(), reverse=True)
    picked: list[int] = []
    while len(picked) < num_documents and any(queues.values()):
        for domain in sorted(queues):
            if queues[domain] and len(picked) < num_documents:
                picked.append(queues[domain].pop())
    return picked
