"""The ranking: one row an architecture, ordered by bits per byte at the longest context.

This module decides which cells are compared; `reports.draw.table` and `reports.page.terminal` write them
down. A value is compared only between architectures that have it for the same cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pandas as pd

from harness.measure.statistics import Estimate, two_level_ratio
from harness.record.schema import Point
from reports.results.load import INDEX, Results, is_number
from reports.results.queries import cost_map, latency_table, longest_shared, lookup
from reports.results.series import Series
from reports.results.statistics import Pooled, pool

PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture. A missing number is None; `failures` has the status that explains it, under
    the same name.

    numbers:   num_parameters, bits_per_byte (and _low, _high, _sd), prefill_ms, decode_ms (and
               _sd), state_bytes, train_tokens_per_s.
    behind:    paired difference in bits per byte to the first row.
    """

    series: Series
    num_seeds: int
    numbers: dict[str, float | None]
    needle_trained: Pooled | None
    needle_beyond: Pooled | None
    behind: Estimate | None = None
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The rows in order, and the cells they were read at (None where there is none).

    phase_context_tokens:  for "prefill" and "decode", the longest context that every architecture
                           with a latency measurement has.
    """

    rows: list[Row]
    context_tokens: float | None
    phase_context_tokens: dict[str, float | None]
    batch_size: float | None
    state_context_tokens: float | None
    is_state_measured: bool


def make_ranking(results: Results) -> Ranking:
    """Ranks all architectures that have a record at all; those without a number at the ranking's
    context come last, by name."""
    tried = [point for point in results.of("perplexity") if is_number(point.cell.get("context_tokens"))]
    context = longest_shared(_contexts(tried))
    latency = latency_table(results)
    batch_size = None if latency.empty else float(latency["batch_size"].min())
    latency = latency[latency["batch_size"] == batch_size]
    contexts = {phase: longest_shared(latency[latency["phase"] == phase]) for phase in PHASES}
    is_measured = bool(latency["state_bytes"].notna().any())
    state_context = contexts["decode"] or contexts["prefill"] if is_measured else context
    rows = [
        _row(results, series, latency, context, contexts, state_context if is_measured else None)
        for series in results.series
    ]
    if not is_measured:
        state_context = _add_predicted_state(results, rows, state_context)
    rows.sort(key=lambda row: (row.numbers["bits_per_byte"] is None, row.numbers["bits_per_byte"] or 0.0))
    return Ranking(
        rows=_add_differences(results, rows, context),
        context_tokens=context,
        phase_context_tokens=contexts,
        batch_size=batch_size,
        state_context_tokens=state_context,
        is_state_measured=is_measured,
    )


def _contexts(points: list[Point]) -> pd.DataFrame:
    rows = [
        {"arch": p.arch, "size": p.size, "context_tokens": float(p.cell["context_tokens"])} for p in points
    ]
    return pd.DataFrame(rows, columns=[*INDEX, "context_tokens"])


def _row(
    results: Results,
    series: Series,
    latency: pd.DataFrame,
    context: float | None,
    contexts: dict[str, float | None],
    state_context: float | None,
) -> Row:
    train, cost, perplexity = (results.table(task) for task in ("train", "cost", "perplexity"))
    numbers: dict[str, float | None] = {
        "num_parameters": lookup(train, series, "num_parameters") or lookup(cost, series, "num_parameters"),
        "train_tokens_per_s": lookup(train, series, "tokens_per_s"),
        "train_tokens_per_s_sd": lookup(train, series, "tokens_per_s_sd"),
        "state_bytes": None,
    }
    for suffix in ("", "_low", "_high", "_sd"):
        name = f"bits_per_byte{suffix}"
        numbers[name] = (
            lookup(perplexity, series, name, context_tokens=context) if context and len(perplexity) else None
        )
    for phase, phase_context in contexts.items():
        cell = {"phase": phase, "context_tokens": phase_context}
        for name, metric in ((f"{phase}_ms", "median_ms"), (f"{phase}_ms_sd", "median_ms_sd")):
            numbers[name] = lookup(latency, series, metric, **cell)
        if state_context is not None and numbers["state_bytes"] is None and phase_context == state_context:
            numbers["state_bytes"] = lookup(latency, series, "state_bytes", **cell)
    needle = [p for p in results.of("needle") if (p.arch, p.size) == series.key]
    trained = {
        p.cell.get("context_tokens") for p in results.ok("needle") if p.metrics.get("is_trained_length")
    }
    seeds = {p.seed for p in results.points if (p.arch, p.size) == series.key}
    return Row(
        series=series,
        num_seeds=len(seeds),
        numbers=numbers,
        needle_trained=pool(p for p in needle if p.cell.get("context_tokens") in trained),
        needle_beyond=pool(p for p in needle if p.cell.get("context_tokens") not in trained),
        failures=_failures(results, series, context, contexts),
    )


def _failures(
    results: Results, series: Series, context: float | None, contexts: dict[str, float | None]
) -> dict[str, str]:
    """The status that explains each number that may be missing."""
    explained: dict[str, str] = {}
    for point in results.failures():
        if (point.arch, point.size) != series.key:
            continue
        if point.task == "train":
            for name in ("bits_per_byte", "needle", "train_tokens_per_s"):
                explained.setdefault(name, point.status)
        elif point.task == "perplexity" and point.cell.get("context_tokens") in (context, None):
            explained["bits_per_byte"] = point.status
        elif point.task == "needle":
            explained["needle"] = point.status
        elif point.task == "latency":
            for phase in PHASES:
                if point.cell.get("phase") in (phase, None):
                    explained.setdefault(f"{phase}_ms", point.status)
                    if point.cell.get("context_tokens") in (contexts[phase], None):
                        explained[f"{phase}_ms"] = point.status
    return explained


def _add_predicted_state(results: Results, rows: list[Row], context: float | None) -> float | None:
    """Where no state was measured, the cost card's prediction at the first context it has from
    `context` on. Returns that context."""
    maps = {row.series.key: cost_map(results, row.series, "state_bytes") for row in rows}
    candidates = sorted({x for curve in maps.values() for x in curve if context is None or x >= context})
    if not candidates:
        return None
    for row in rows:
        row.numbers["state_bytes"] = maps[row.series.key].get(candidates[0])
    return candidates[0]


def _add_differences(results: Results, rows: list[Row], context: float | None) -> list[Row]:
    """Return the rows with their paired differences to the first row, over the documents and seeds that both
    have, read from the same data.

    Pairing matters: documents differ far more than models do, so that two overlapping intervals can hide a
    difference that holds on nearly every document."""
    if not rows or context is None:
        return rows
    first = _documents(results, rows[0].series, context)
    compared = [rows[0]]
    for row in rows[1:]:
        own = _documents(results, row.series, context)
        seeds = [seed for seed in own if seed in first and own[seed][1:] == first[seed][1:]]
        difference = None
        if seeds:
            difference = two_level_ratio(
                [[a - b for a, b in zip(own[seed][0], first[seed][0], strict=True)] for seed in seeds],
                [[size * math.log(2) for size in first[seed][1]] for seed in seeds],
            )
        compared.append(replace(row, behind=difference))
    return compared


def _documents(
    results: Results, series: Series, context: float
) -> dict[int, tuple[list[float], list[float], str | None]]:
    """seed -> (nats, bytes) of each document, where the samples are whole, and the data's hash.

    Documents of equal size need not be equal: the hash tells whether they are."""
    hashes = {header.run_id: header.data_hash for header in results.headers}
    documents = {}
    for point in results.samples(series, "perplexity"):
        nats, sizes = point.samples.get("document_nll_nats"), point.samples.get("document_bytes")
        if point.cell.get("context_tokens") != context or not nats or not sizes:
            continue
        if len(nats) == len(sizes) and all(is_number(value) for value in [*nats, *sizes]):
            documents[point.seed] = (list(nats), list(sizes), hashes.get(point.run_id))
    return documents
