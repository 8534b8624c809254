"""Questions that several sections ask of the results: which contexts, one number, why there is none."""

from __future__ import annotations

import math

import pandas as pd

from reports.results.load import INDEX, Results, is_number
from reports.results.series import Series


def contexts_of(results: Results, task: str) -> list[float]:
    """All context lengths that were tried for a task, in order."""
    found = {point.cell.get("context_tokens") for point in results.of(task)}
    return sorted(float(value) for value in found if is_number(value))


def trained_contexts(results: Results) -> set[float]:
    """The needle contexts that lie among the trained lengths."""
    points = [point for point in results.ok("needle") if point.metrics.get("is_trained_length")]
    return {float(p.cell["context_tokens"]) for p in points if is_number(p.cell.get("context_tokens"))}


def longest_trained(results: Results) -> float | None:
    """The longest length that any architecture was trained on, in tokens; None if not recorded."""
    lengths = [
        float(value)
        for point in results.ok("train")
        for value in point.details.get("trained_lengths_tokens") or []
        if is_number(value)
    ]
    return max([*lengths, *trained_contexts(results)], default=None)


def chance_accuracy(results: Results) -> float | None:
    """The needle's chance level, None if not recorded."""
    chances = [p.metrics.get("chance_accuracy") for p in results.ok("needle")]
    return max((float(value) for value in chances if value is not None and is_number(value)), default=None)


def status_of(results: Results, series: Series, task: str, context: float | None = None) -> str | None:
    """Why a cell has no number: its own failure, else the training's."""
    for wanted in (task, "train"):
        for point in results.failures():
            is_here = context is None or point.cell.get("context_tokens") in (context, None)
            if (point.arch, point.size, point.task) == (*series.key, wanted) and is_here:
                return point.status
    return None


def longest_shared(frame: pd.DataFrame) -> float | None:
    """The longest context that every (architecture, size) in the frame has; where there is none,
    the longest of those that the most of them have."""
    if frame.empty or "context_tokens" not in frame:
        return None
    counts = frame.drop_duplicates([*INDEX, "context_tokens"]).groupby("context_tokens").size()
    return float(counts[counts == counts.max()].index.max())


def latency_table(results: Results) -> pd.DataFrame:
    """`results.table("latency")` with the columns a report relies on always there."""
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
    """One of the cost card's maps, context in tokens -> number; empty where there is none."""
    for point in results.samples(series, "cost"):
        values = point.details.get(name)
        if isinstance(values, dict):
            return {float(key): float(value) for key, value in values.items() if is_number(value)}
    return {}
