"""The ranking: one row per architecture, ordered by bits per byte at the longest context.

This module decides which cells are compared; `reports.results.columns` says what stands in the columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from harness.measure.statistics import Estimate, two_level_ratio
from reports.results.columns import COLUMNS, ComparedCells, RankingColumn, Value, declared_columns
from reports.results.load import INDEX, Results, is_number
from reports.results.queries import cost_map, latency_table, longest_shared
from reports.results.series import Series

PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture: column name -> its value."""

    series: Series
    values: dict[str, Value] = field(default_factory=dict)

    def number(self, column: str) -> float | None:
        """Return the number of a column; None where it is missing."""
        return self.values[column].value


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The rows in order, the columns, and the cells they were read at."""

    rows: list[Row]
    columns: list[RankingColumn]
    cells: ComparedCells


def make_ranking(results: Results) -> Ranking:
    """Rank all architectures that have a record; those without a loss at the ranking's context come last, by
    name."""
    cells = _compared_cells(results)
    columns = [*COLUMNS, *declared_columns(results)]
    rows = [
        Row(
            series=series,
            values={
                column.name: column.read(results, cells, series)
                for column in columns
                if column.read is not None
            },
        )
        for series in results.series
    ]
    rows.sort(key=lambda row: (row.number("bits_per_byte") is None, row.number("bits_per_byte") or 0.0))
    differences = _differences(results, rows, cells.context_tokens)
    for row, difference in zip(rows, differences, strict=True):
        value, low, high = difference or (None, None, None)
        row.values["behind"] = Value(value=value, low=low, high=high)
    if not any(differences):
        columns = [column for column in columns if column.name != "behind"]
    return Ranking(rows=rows, columns=columns, cells=cells)


def _compared_cells(results: Results) -> ComparedCells:
    tried = [point for point in results.of("perplexity") if is_number(point.cell.get("context_tokens"))]
    contexts = pd.DataFrame(
        [{"arch": p.arch, "size": p.size, "context_tokens": float(p.cell["context_tokens"])} for p in tried],
        columns=[*INDEX, "context_tokens"],
    )
    context = longest_shared(contexts)
    latency = latency_table(results)
    batch_size = None if latency.empty else float(latency["batch_size"].min())
    latency = latency[latency["batch_size"] == batch_size]
    by_phase = {phase: longest_shared(latency[latency["phase"] == phase]) for phase in PHASES}
    is_measured = bool(latency["state_bytes"].notna().any())
    return ComparedCells(
        context_tokens=context,
        phase_context_tokens=by_phase,
        batch_size=batch_size,
        latency=latency,
        state_context_tokens=by_phase["decode"] or by_phase["prefill"]
        if is_measured
        else _predicted_context(results, context),
        is_state_measured=is_measured,
    )


def _predicted_context(results: Results, context: float | None) -> float | None:
    """Return the first context from `context` on at which the cost card predicts a state."""
    maps = (cost_map(results, series, "state_bytes") for series in results.series)
    return min((x for known in maps for x in known if context is None or x >= context), default=None)


def _differences(results: Results, rows: list[Row], context: float | None) -> list[Estimate | None]:
    """Return the paired difference of each row to the first one, over the documents and seeds that both have,
    read from the same data; None for the first row, and where there is nothing to pair.

    Pairing matters: documents differ far more than models do, so that two overlapping intervals can hide a
    difference that holds on nearly every document."""
    if not rows or context is None:
        return [None] * len(rows)
    first = _documents(results, rows[0].series, context)
    differences: list[Estimate | None] = [None]
    for row in rows[1:]:
        own = _documents(results, row.series, context)
        seeds = [seed for seed in own if seed in first and own[seed][1:] == first[seed][1:]]
        difference = None
        if seeds:
            difference = two_level_ratio(
                [[a - b for a, b in zip(own[seed][0], first[seed][0], strict=True)] for seed in seeds],
                [[size * math.log(2) for size in first[seed][1]] for seed in seeds],
            )
        differences.append(difference)
    return differences


def _documents(
    results: Results, series: Series, context: float
) -> dict[int, tuple[list[float], list[float], str | None]]:
    """Return seed -> (nats, bytes) of each document, where the samples are whole, and the data's hash.

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
