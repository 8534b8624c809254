"""Answers that several sections need from the results: contexts, single numbers, and why there is none."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import pandas as pd

from harness.measure.statistics import wilson_interval_over_seeds
from harness.record.schema import Point
from reports.results.load import INDEX, Results, is_number
from reports.results.series import Series


def contexts_of(results: Results, task: str) -> list[float]:
    """Return all context lengths that were tried for a task, in order."""
    found = {point.cell.get("context_tokens") for point in results.of(task)}
    return sorted(float(value) for value in found if is_number(value))


def trained_contexts(results: Results) -> set[float]:
    """Return the contexts of the needle that lie among the trained lengths."""
    points = [point for point in results.ok("needle") if point.metrics.get("is_trained_length")]
    return {float(p.cell["context_tokens"]) for p in points if is_number(p.cell.get("context_tokens"))}


def longest_trained(results: Results) -> float | None:
    """Return the longest length that any architecture was trained on, in tokens; None if not recorded."""
    lengths = [
        float(value)
        for point in results.ok("train")
        for value in point.details.get("trained_lengths_tokens") or []
        if is_number(value)
    ]
    return max([*lengths, *trained_contexts(results)], default=None)


def chance_accuracy(results: Results) -> float | None:
    """Return the needle's chance level; None if not recorded."""
    chances = [p.metrics.get("chance_accuracy") for p in results.ok("needle")]
    return max((float(value) for value in chances if value is not None and is_number(value)), default=None)


def status_of(results: Results, series: Series, task: str, context: float | None = None) -> str | None:
    """Return why a cell has no number: its own failure, else the training's."""
    for wanted in (task, "train"):
        for point in results.failures():
            is_here = context is None or point.cell.get("context_tokens") in (context, None)
            if (point.arch, point.size, point.task) == (*series.key, wanted) and is_here:
                return point.status
    return None


def failure_of_phase(results: Results, series: Series, phase: str, context: float | None) -> str | None:
    """Return why a phase of the latency has no number: its failure at the context, else at any other."""
    found = [
        point
        for point in results.of("latency", series)
        if point.status != "ok" and point.cell.get("phase") in (phase, None)
    ]
    here = [point for point in found if point.cell.get("context_tokens") in (context, None)]
    return next((point.status for point in [*here, *found]), None)


def longest_shared(frame: pd.DataFrame) -> float | None:
    """Return the longest context that every (architecture, size) in the frame has.

    Where there is none, it is the longest of the contexts that most of them have."""
    if frame.empty or "context_tokens" not in frame:
        return None
    counts = frame.drop_duplicates([*INDEX, "context_tokens"]).groupby("context_tokens").size()
    return float(counts[counts == counts.max()].index.max())


def latency_table(results: Results) -> pd.DataFrame:
    """Return `results.table("latency")` with all the columns that a report relies on."""
    table = results.table("latency")
    columns = ["phase", "context_tokens", "batch_size", "median_ms", "p10_ms", "p90_ms", "tokens_per_s"]
    for name in [*columns, "peak_memory_bytes", "state_bytes", "first_call_ms", "dispatch_ms"]:
        if name not in table:
            table[name] = math.nan
    return table


def rows_of(frame: pd.DataFrame, series: Series) -> pd.DataFrame:
    """Return the rows of one series."""
    return frame[(frame["arch"] == series.arch) & (frame["size"] == series.size)]


def lookup(frame: pd.DataFrame, series: Series, metric: str, **cell: object) -> float | None:
    """Return one number of a table; None where it is missing."""
    if metric not in frame:
        return None
    rows = rows_of(frame, series)
    for name, value in cell.items():
        rows = rows[rows[name] == value]
    found = rows[metric].dropna()
    return float(found.iloc[0]) if len(found) else None


def cost_map(results: Results, series: Series, name: str) -> dict[float, float]:
    """Return one map of the cost card, context in tokens -> number; empty where there is none."""
    for point in results.samples(series, "cost"):
        values = point.details.get(name)
        if isinstance(values, dict):
            return {float(key): float(value) for key, value in values.items() if is_number(value)}
    return {}


@dataclass(frozen=True, kw_only=True)
class CellPoints:
    """The points of one series in one cell of a task, over all seeds.

    series: None for what is measured without an architecture.
    """

    series: Series | None
    cell: Mapping[str, Any]
    points: list[Point]

    @property
    def num_seeds(self) -> int:
        """Number of seeds that have a number."""
        return len({point.seed for point in self.points if point.status == "ok"})

    @property
    def status(self) -> str | None:
        """Why there is no number; None where a seed has one."""
        return None if self.num_seeds else self.points[0].status

    def mean(self, metric: str | None) -> float | None:
        """Return the mean over the seeds that have this number; None where none has."""
        found = [point.metrics.get(metric or "") for point in self.points if point.status == "ok"]
        known = [float(value) for value in found if is_number(value)]
        return mean(known) if known else None


def cells_of(results: Results, task: str) -> list[CellPoints]:
    """Return the points of a task by cell, in the order in which cells first appear, and within a cell by
    series."""
    order = {series.key: index for index, series in enumerate(results.series)}
    series = {series.key: series for series in results.series}
    cells: dict[str, dict[tuple[str, str], list[Point]]] = {}
    for point in results.of(task):
        cell = json.dumps(point.cell, sort_keys=True)
        cells.setdefault(cell, {}).setdefault((point.arch, point.size), []).append(point)
    return [
        CellPoints(series=series.get(key), cell=points[0].cell, points=points)
        for by_series in cells.values()
        for key, points in sorted(by_series.items(), key=lambda item: order.get(item[0], -1))
    ]


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Needle examples of several cells taken together.

    accuracy, low, high:  exact-match share and its Wilson 95% interval over seeds.
    num_cells, num_cells_tried:  cells with a number, and cells that should have one.
    """

    accuracy: float
    low: float
    high: float
    num_examples: int
    num_cells: int
    num_cells_tried: int


def pool(points: Iterable[Point]) -> Pooled | None:
    """Return needle points taken together, failed ones counting as cells tried; None where none has a number.

    Seeds are pooled too, and further seeds do not narrow the interval."""
    points = list(points)
    usable = [
        p
        for p in points
        if p.status == "ok" and is_number(p.metrics.get("accuracy")) and p.metrics.get("num_examples")
    ]
    if not usable:
        return None
    num_correct, num_examples = Counter[int](), Counter[int]()
    for point in usable:
        count = int(point.metrics["num_examples"] or 0)
        num_examples[point.seed] += count
        num_correct[point.seed] += round(float(point.metrics["accuracy"] or 0) * count)
    low, high = wilson_interval_over_seeds(
        [num_correct[seed] for seed in num_examples], list(num_examples.values())
    )
    return Pooled(
        accuracy=num_correct.total() / num_examples.total(),
        low=low,
        high=high,
        num_examples=num_examples.total(),
        num_cells=len(usable),
        num_cells_tried=len(points),
    )
