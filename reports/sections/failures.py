"""What was tried and gave no number."""

from __future__ import annotations

import math

from harness.record.schema import Point
from reports.draw.numbers import MISSING, STATUS_WORDS, integer
from reports.draw.table import Cell, Column, Table, name_cell
from reports.results.load import Results
from reports.sections.base import Folded, Section


def section(results: Results) -> Section:
    """Return the section; it says so where nothing failed."""
    table = failures_table(results)
    damaged = results.damaged_lines
    return Section(
        anchor="failures",
        title="What did not work",
        notes=[] if table.rows else ["Every cell that was tried gave a number."],
        tables=[table] if table.rows else [],
        folded=[Folded(title=f"Damaged record lines ({len(damaged)})", texts=["\n".join(damaged)])]
        if damaged
        else [],
    )


def failures_table(results: Results) -> Table:
    """Return all that was tried and gave no number, with the reason.

    Cells of one architecture, task and seed that failed alike share a row."""
    labels = {series.key: series for series in results.series}
    groups: dict[tuple[object, ...], list[Point]] = {}
    for point in results.failures():
        key = (point.arch, point.size, point.task, point.seed, point.status, point.reason)
        groups.setdefault(key, []).append(point)
    rows = []
    for points in groups.values():
        point = points[0]
        series = labels.get((point.arch, point.size))
        rows.append(
            [
                name_cell(series) if series else Cell(text=MISSING),
                Cell(text=point.task.replace("_", " ")),
                Cell(text=cells_text([p.cell for p in points])),
                Cell(text=integer(point.seed)),
                Cell(text=STATUS_WORDS[point.status], status=point.status),
                Cell(text=point.reason or "no reason recorded"),
            ]
        )
    return Table(
        name="failures",
        caption="What was tried and gave no number; cells that failed alike share a row.",
        columns=[
            Column(title="Architecture", is_numeric=False),
            Column(title="Task", is_numeric=False),
            Column(title="Cells", is_numeric=False),
            Column(title="Seed"),
            Column(title="What happened", is_numeric=False),
            Column(title="Reason", is_numeric=False),
        ],
        rows=rows,
    )


def cells_text(cells: list[dict[str, object]]) -> str:
    """Return cells in words: the values of each coordinate where they form a whole grid, else one by one."""
    if len(cells) == 1:
        return cell_text(cells[0])
    values = {name: list(dict.fromkeys(str(cell.get(name)) for cell in cells)) for name in cells[0]}
    if math.prod(len(found) for found in values.values()) != len(cells):
        return f"{len(cells)} cells: " + "; ".join(cell_text(cell) for cell in cells)
    grid = "; ".join(f"{name.replace('_', ' ')} {', '.join(found)}" for name, found in values.items())
    return f"{len(cells)} cells: {grid}"


def cell_text(cell: dict[str, object]) -> str:
    """Return a cell's coordinates: "1,024 tokens, depth 0.5"."""
    parts = []
    for name, value in cell.items():
        if name == "context_tokens" and isinstance(value, (int, float)):
            parts.append(f"{value:,.0f} tokens")
        else:
            parts.append(str(value) if name == "phase" else f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts) or "the whole job"
