"""The report's tables as plain data: columns, rows of cells, and a caption. HTML comes later."""

from __future__ import annotations

from dataclasses import dataclass, field

from reports.draw.numbers import (
    MISSING,
    STATUS_WORDS,
    fixed,
    percent,
    significant,
)
from reports.results.series import Series
from reports.results.statistics import Pooled


@dataclass(frozen=True, kw_only=True)
class Column:
    """title, its unit or meaning in small print, and whether the cells are numbers."""

    title: str
    unit: str = ""
    is_numeric: bool = True


@dataclass(kw_only=True)
class Cell:
    """text, and a note in small print under it. `status` is set where a measurement failed."""

    text: str
    note: str = ""
    is_best: bool = False
    status: str = ""
    colour: str = ""


@dataclass(kw_only=True)
class Table:
    """A caption that says what is seen, columns, and rows of as many cells."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]] = field(default_factory=list)


def name_cell(series: Series) -> Cell:
    """An architecture's name with its colour."""
    return Cell(text=series.label, colour=series.colour)


def failed_cell(status: str | None) -> Cell:
    """A missing number: the failure's word where there is one, else a dash."""
    return Cell(text=STATUS_WORDS[status], status=status) if status else Cell(text=MISSING)


def number_cell(value: float | None, text: str, status: str | None = None, note: str = "") -> Cell:
    """A number already written down, or why there is none."""
    return failed_cell(status) if value is None else Cell(text=text, note=note)


def mark_best(cells: list[Cell], values: list[float | None], is_higher_better: bool) -> None:
    """Marks the best value and all that are written the same; nothing where nothing differs."""
    known = [(value, cell) for value, cell in zip(values, cells, strict=True) if value is not None]
    if len({cell.text for _, cell in known}) < 2:
        return
    pick = max if is_higher_better else min
    best = pick(known, key=lambda item: item[0])[1].text
    for _, cell in known:
        cell.is_best = cell.text == best


def pooled_cell(pooled: Pooled | None, status: str | None) -> Cell:
    """A pooled accuracy with its interval, and how many cells are missing from it."""
    if pooled is None:
        return failed_cell(status)
    note = f"[{percent(pooled.low)}, {percent(pooled.high)}]"
    if pooled.num_cells < pooled.num_cells_tried:
        note += f" {pooled.num_cells} of {pooled.num_cells_tried} cells"
    return Cell(text=percent(pooled.accuracy), note=note)


def interval_text(low: float | None, high: float | None, decimals: int) -> str:
    """[1.234, 1.345], empty where unknown."""
    return "" if low is None or high is None else f"[{fixed(low, decimals)}, {fixed(high, decimals)}]"


def spread(standard_deviation: float | None) -> str:
    """ " ± 0.01 over seeds", empty for one seed."""
    return "" if standard_deviation is None else f" ± {significant(standard_deviation, 2)} over seeds"
