"""Tables as plain data: a caption, columns, and rows of cells. They are written elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

from reports.draw.numbers import MISSING, STATUS_WORDS, fixed, number_text, percent, significant
from reports.results.columns import Value
from reports.results.queries import Pooled
from reports.results.series import Series


@dataclass(frozen=True, kw_only=True)
class Column:
    """A title, its unit or meaning in small print, and whether the cells are numbers."""

    title: str
    unit: str = ""
    is_numeric: bool = True


@dataclass(kw_only=True)
class Cell:
    """A text, and a note in small print below it.

    status: why a measurement failed, "" where it did not.
    colour: of the swatch before the text, "" for none.
    """

    text: str
    note: str = ""
    is_best: bool = False
    status: str = ""
    colour: str = ""


@dataclass(kw_only=True)
class Table:
    """A caption that says what is seen, columns, and rows of as many cells.

    name: unique on the page.
    """

    name: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]] = field(default_factory=list)


def name_cell(series: Series) -> Cell:
    """Return an architecture's name with its colour."""
    return Cell(text=series.label, colour=series.colour)


def failed_cell(status: str | None) -> Cell:
    """Return a missing number: the word for the failure where there was one, else a dash."""
    return Cell(text=STATUS_WORDS[status], status=status) if status else Cell(text=MISSING)


def number_cell(value: float | None, text: str, status: str | None = None, note: str = "") -> Cell:
    """Return a number in its written form, or why there is none."""
    return failed_cell(status) if value is None else Cell(text=text, note=note)


def value_cell(value: Value, unit: str, *, is_signed: bool = False) -> Cell:
    """Return a value of the ranking with its interval, its spread over seeds and the cells it lacks."""
    if value.value is None:
        return failed_cell(value.status)
    sign = "+" if is_signed and value.value >= 0 else ""
    note = spread(value.sd) + _lacking(value.num_cells, value.num_cells_tried)
    if value.low is not None and value.high is not None:
        note = f"[{number_text(value.low, unit)}, {number_text(value.high, unit)}]" + note
    return Cell(text=sign + number_text(value.value, unit), note=note.strip())


def pooled_cell(pooled: Pooled | None, status: str | None) -> Cell:
    """Return a pooled accuracy with its interval and the cells it lacks."""
    if pooled is None:
        return failed_cell(status)
    note = f"[{percent(pooled.low)}, {percent(pooled.high)}]"
    return Cell(text=percent(pooled.accuracy), note=note + _lacking(pooled.num_cells, pooled.num_cells_tried))


def mark_best(cells: list[Cell], values: list[float | None], is_higher_better: bool) -> None:
    """Mark the best value and all that are written alike; mark nothing where nothing differs."""
    known = [(value, cell) for value, cell in zip(values, cells, strict=True) if value is not None]
    if len({cell.text for _, cell in known}) < 2:
        return
    pick = max if is_higher_better else min
    best = pick(known, key=lambda item: item[0])[1].text
    for _, cell in known:
        cell.is_best = cell.text == best


def interval_text(low: float | None, high: float | None, decimals: int) -> str:
    """Return "[1.234, 1.345]", "" where an end is unknown."""
    return "" if low is None or high is None else f"[{fixed(low, decimals)}, {fixed(high, decimals)}]"


def spread(standard_deviation: float | None) -> str:
    """Return " ± 0.01 over seeds", "" for one seed."""
    return "" if standard_deviation is None else f" ± {significant(standard_deviation, 2)} over seeds"


def _lacking(num_cells: int, num_cells_tried: int) -> str:
    return f" {num_cells} of {num_cells_tried} cells" if num_cells < num_cells_tried else ""
