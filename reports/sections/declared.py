"""A section for any task, made from what the task declares of its numbers.

A task without a file of its own here appears through it: one row per cell and architecture, the headline
numbers first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from harness.record.metrics import Metric
from reports.draw.numbers import MISSING, integer, number_text, significant
from reports.draw.table import Cell, Column, Table, failed_cell, mark_best, name_cell
from reports.results.load import Results, is_number
from reports.results.queries import CellPoints, cells_of
from reports.sections.base import Section

#: Units that `number_text` writes with the number.
WRITTEN_UNITS = ("", "bytes", "bytes/s", "share")


def section(results: Results, task: str) -> Section:
    """Return the section of a task."""
    title = task.replace("_", " ").capitalize()
    return Section(anchor=f"task-{_slug(task)}", title=title, tables=[declared_table(results, task)])


def declared_table(results: Results, task: str) -> Table:
    """Return every cell of a task: means over seeds with the interval that the task declares, the number of
    seeds, and the status of what failed."""
    cells = cells_of(results, task)
    metrics = _shown_metrics(results, task, cells)
    coordinates = list(dict.fromkeys(name for one in cells for name in one.cell))
    has_series = any(one.series for one in cells)
    rows = [
        [
            *([name_cell(one.series) if one.series else Cell(text=MISSING)] if has_series else []),
            *(Cell(text=_coordinate_text(one.cell.get(name))) for name in coordinates),
            *(_number(one, metric, is_first=metric is metrics[0]) for metric in metrics),
            Cell(text=integer(one.num_seeds)),
        ]
        for one in cells
    ]
    for position, metric in enumerate(metrics, start=len(coordinates) + has_series):
        _mark_best(cells, metric, [row[position] for row in rows])
    return Table(
        name=f"task-{_slug(task)}",
        caption="Every cell, by what the task declares of its numbers. Means over seeds, ends of intervals "
        "in brackets; bold is the best of a cell.",
        columns=[
            *([Column(title="Architecture", is_numeric=False)] if has_series else []),
            *(_coordinate_column(name, cells) for name in coordinates),
            *(_metric_column(metric) for metric in metrics),
            Column(title="Seeds"),
        ],
        rows=rows,
    )


def _shown_metrics(results: Results, task: str, cells: Sequence[CellPoints]) -> list[Metric]:
    """Return the metrics that have a column: headlines first, no interval ends, none that no cell has.

    Records of a task that declares nothing show every number by its name."""
    names = list(dict.fromkeys(name for one in cells for point in one.points for name in point.metrics))
    declared = results.metrics(task) or tuple(
        Metric(name=name, label=name.replace("_", " "), unit="", direction="neither", kind="quality")
        for name in names
    )
    ends = {end for metric in declared for end in (metric.low, metric.high)}
    found = [
        metric
        for metric in declared
        if metric.name not in ends and any(one.mean(metric.name) is not None for one in cells)
    ]
    headlines = [metric for metric in declared if metric.is_headline][:1]
    ordered = [*headlines, *sorted(found, key=lambda metric: not metric.is_headline)]
    return list(dict.fromkeys(ordered or declared[:1]))


def _number(one: CellPoints, metric: Metric, *, is_first: bool) -> Cell:
    """Return the mean with its interval; in the first column, the status of a cell without any number."""
    value = one.mean(metric.name)
    if value is None:
        return failed_cell(one.status if is_first else None)
    low, high = one.mean(metric.low), one.mean(metric.high)
    has_interval = low is not None and high is not None
    note = f"[{number_text(low, metric.unit)}, {number_text(high, metric.unit)}]" if has_interval else ""
    return Cell(text=number_text(value, metric.unit), note=note)


def _mark_best(cells: Sequence[CellPoints], metric: Metric, column: Sequence[Cell]) -> None:
    """Mark the best architecture of each cell, where the metric says which direction is better."""
    if metric.direction == "neither":
        return
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(cells):
        groups.setdefault(repr(one.cell), []).append(index)
    for indices in groups.values():
        values = [cells[index].mean(metric.name) for index in indices]
        mark_best([column[index] for index in indices], values, metric.is_better_higher)


def _metric_column(metric: Metric) -> Column:
    better = "" if metric.direction == "neither" else f"{metric.direction} is better"
    unit = "" if metric.unit in WRITTEN_UNITS else metric.unit
    return Column(
        title=metric.label[:1].upper() + metric.label[1:],
        unit=", ".join(part for part in (unit, better) if part),
    )


def _coordinate_column(name: str, cells: Sequence[CellPoints]) -> Column:
    title = name.removesuffix("_tokens").replace("_", " ").capitalize()
    is_numeric = all(is_number(one.cell[name]) for one in cells if one.cell.get(name) is not None)
    return Column(title=title, unit="tokens" if name.endswith("_tokens") else "", is_numeric=is_numeric)


def _coordinate_text(value: Any) -> str:
    if value is None:
        return MISSING
    if is_number(value):
        return integer(value) if value == round(value) else significant(value)
    return str(value)


def _slug(task: str) -> str:
    """Return the name of a task as an anchor: letters, digits and underscores."""
    return re.sub(r"\W", "_", task)
