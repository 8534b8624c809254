"""The report's tables as plain data: columns, rows of cells, and a caption. HTML comes later."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from harness.record.schema import Point
from reports.draw.numbers import (
    MISSING,
    STATUS_WORDS,
    bytes_text,
    fixed,
    integer,
    percent,
    scaled,
    significant,
)
from reports.results.load import Results
from reports.results.ranking import Ranking, Row
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


def ranking_table(ranking: Ranking) -> Table:
    """See `reports.results.ranking`; the best value of each column is marked."""
    contexts = ranking.phase_context_tokens
    batch = f", batch {integer(ranking.batch_size)}" if ranking.batch_size and ranking.batch_size > 1 else ""
    has_differences = any(row.behind for row in ranking.rows)
    columns = [
        Column(title="#"),
        Column(title="Architecture", is_numeric=False),
        Column(title="Parameters"),
        Column(title="Bits per byte", unit=f"{_at(ranking.context_tokens)} [95%]"),
        *([Column(title="Behind the first", unit="bits per byte, paired [95%]")] if has_differences else []),
        Column(title="Needle, trained lengths", unit="exact match [95%]"),
        Column(title="Needle, beyond", unit="exact match [95%]"),
        Column(title="Prefill", unit=f"ms a prompt {_at(contexts['prefill'])}{batch}"),
        Column(title="Decode", unit=f"ms a token {_at(contexts['decode'])}{batch}"),
        Column(
            title="State",
            unit=f"{'measured' if ranking.is_state_measured else 'predicted'} "
            f"{_at(ranking.state_context_tokens)}",
        ),
        Column(title="Training", unit="tokens/s"),
    ]
    table = Table(
        name="ranking",
        caption="One row an architecture, ordered by bits per byte at the longest context; "
        "bold is the best of its column.",
        columns=columns,
        rows=[_ranking_cells(index, row, has_differences) for index, row in enumerate(ranking.rows, start=1)],
    )
    keys: list[tuple[int, list[float | None], bool]] = [
        (3, [row.numbers["bits_per_byte"] for row in ranking.rows], False),
        (-6, [_comparable(row.needle_trained) for row in ranking.rows], True),
        (-5, [_comparable(row.needle_beyond) for row in ranking.rows], True),
        (-4, [row.numbers["prefill_ms"] for row in ranking.rows], False),
        (-3, [row.numbers["decode_ms"] for row in ranking.rows], False),
        (-2, [row.numbers["state_bytes"] for row in ranking.rows], False),
        (-1, [row.numbers["train_tokens_per_s"] for row in ranking.rows], True),
    ]
    for position, values, is_higher_better in keys:
        mark_best([row[position] for row in table.rows], values, is_higher_better)
    return table


def _at(context_tokens: float | None) -> str:
    return "" if context_tokens is None else f"at {integer(context_tokens)} tokens"


def mark_best(cells: list[Cell], values: list[float | None], is_higher_better: bool) -> None:
    """Marks the best value and all that are written the same; nothing where nothing differs."""
    known = [(value, cell) for value, cell in zip(values, cells, strict=True) if value is not None]
    if len({cell.text for _, cell in known}) < 2:
        return
    pick = max if is_higher_better else min
    best = pick(known, key=lambda item: item[0])[1].text
    for _, cell in known:
        cell.is_best = cell.text == best


def _ranking_cells(index: int, row: Row, has_differences: bool) -> list[Cell]:
    numbers, failures = row.numbers, row.failures
    bits = numbers["bits_per_byte"]
    note = interval_text(numbers["bits_per_byte_low"], numbers["bits_per_byte_high"], 3)
    cells = [
        Cell(text=str(index) if bits is not None else MISSING),
        name_cell(row.series),
        number_cell(numbers["num_parameters"], scaled(numbers["num_parameters"])),
        number_cell(
            bits, fixed(bits, 3), failures.get("bits_per_byte"), note + spread(numbers["bits_per_byte_sd"])
        ),
    ]
    if has_differences:
        difference = row.behind
        note = interval_text(difference[1], difference[2], 3) if difference else ""
        cells.append(Cell(text=f"{difference[0]:+.3f}" if difference else MISSING, note=note))
    cells += [
        pooled_cell(pooled, failures.get("needle")) for pooled in (row.needle_trained, row.needle_beyond)
    ]
    for phase in ("prefill", "decode"):
        value = numbers[f"{phase}_ms"]
        cells.append(
            number_cell(
                value,
                significant(value),
                failures.get(f"{phase}_ms"),
                spread(numbers[f"{phase}_ms_sd"]).strip(),
            )
        )
    speed = numbers["train_tokens_per_s"]
    return [
        *cells,
        number_cell(numbers["state_bytes"], bytes_text(numbers["state_bytes"])),
        number_cell(speed, integer(speed), failures.get("train_tokens_per_s")),
    ]


def pooled_cell(pooled: Pooled | None, status: str | None) -> Cell:
    """A pooled accuracy with its interval, and how many cells are missing from it."""
    if pooled is None:
        return failed_cell(status)
    note = f"[{percent(pooled.low)}, {percent(pooled.high)}]"
    if pooled.num_cells < pooled.num_cells_tried:
        note += f" {pooled.num_cells} of {pooled.num_cells_tried} cells"
    return Cell(text=percent(pooled.accuracy), note=note)


def _comparable(pooled: Pooled | None) -> float | None:
    """An accuracy over fewer cells than its rivals' is no candidate for the best."""
    return None if pooled is None or pooled.num_cells < pooled.num_cells_tried else pooled.accuracy


def interval_text(low: float | None, high: float | None, decimals: int) -> str:
    """[1.234, 1.345], empty where unknown."""
    return "" if low is None or high is None else f"[{fixed(low, decimals)}, {fixed(high, decimals)}]"


def spread(standard_deviation: float | None) -> str:
    """ " ± 0.01 over seeds", empty for one seed."""
    return "" if standard_deviation is None else f" ± {significant(standard_deviation, 2)} over seeds"


def failures_table(results: Results) -> Table:
    """Everything that was tried and gave no number, with its reason; cells of one architecture, task
    and seed that failed alike share a row."""
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
    """One cell in words; several as the values of each coordinate where they form a whole grid, else
    one by one."""
    if len(cells) == 1:
        return cell_text(cells[0])
    values = {name: list(dict.fromkeys(str(cell.get(name)) for cell in cells)) for name in cells[0]}
    if math.prod(len(found) for found in values.values()) != len(cells):
        return f"{len(cells)} cells: " + "; ".join(cell_text(cell) for cell in cells)
    grid = "; ".join(f"{name.replace('_', ' ')} {', '.join(found)}" for name, found in values.items())
    return f"{len(cells)} cells: {grid}"


def cell_text(cell: dict[str, object]) -> str:
    """A cell's coordinates: 1,024 tokens, depth 0.5"""
    parts = []
    for name, value in cell.items():
        if name == "context_tokens" and isinstance(value, (int, float)):
            parts.append(f"{value:,.0f} tokens")
        else:
            parts.append(str(value) if name == "phase" else f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts) or "the whole job"
