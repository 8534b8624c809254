"""The ranking as a table, from the columns that `reports.results.columns` declares."""

from __future__ import annotations

from reports.draw.numbers import MISSING, integer
from reports.draw.table import Cell, Column, Table, mark_best, name_cell, value_cell
from reports.results.columns import ComparedCells, RankingColumn
from reports.results.load import Results
from reports.results.ranking import Ranking, make_ranking
from reports.sections.base import Section


def section(results: Results) -> Section:
    """Return the section."""
    table = ranking_table(make_ranking(results))
    return Section(anchor="ranking", title="Ranking", tables=[table], footnotes=ranking_notes(results))


def ranking_table(ranking: Ranking) -> Table:
    """Return one row per architecture, the best value of each column marked."""
    columns = [
        [value_cell(row.values[column.name], column.unit, is_signed=column.is_signed) for row in ranking.rows]
        for column in ranking.columns
    ]
    for column, cells in zip(ranking.columns, columns, strict=True):
        if column.direction != "neither":
            values = [row.values[column.name].comparable for row in ranking.rows]
            mark_best(cells, values, column.direction == "higher")
    places = [
        str(place) if row.number("bits_per_byte") is not None else MISSING
        for place, row in enumerate(ranking.rows, start=1)
    ]
    return Table(
        name="ranking",
        caption="One row per architecture, ordered by bits per byte at the longest context; "
        "bold is the best of its column.",
        columns=[
            Column(title="#"),
            Column(title="Architecture", is_numeric=False),
            *(Column(title=c.title, unit=_small_print(c, ranking.cells)) for c in ranking.columns),
        ],
        rows=[
            [Cell(text=place), name_cell(row.series), *cells]
            for place, row, *cells in zip(places, ranking.rows, *columns, strict=True)
        ],
    )


def _small_print(column: RankingColumn, cells: ComparedCells) -> str:
    context, batch = column.at(cells), cells.batch_size
    return column.small_print.format(
        at="" if context is None else f"at {integer(context)} tokens",
        batch=f", batch {integer(batch)}" if batch and batch > 1 else "",
        source="measured" if cells.is_state_measured else "predicted",
    ).strip()


def ranking_notes(results: Results) -> list[str]:
    """Return how the order, the intervals and the times are to be read."""
    notes = [
        "Order: bits per byte at the longest context that every architecture was given, lowest first; those "
        "without a number there come last. No other column affects it.",
        "Intervals: bits per byte by a 95% bootstrap over documents, needle by Wilson’s 95% over examples. "
        "“Behind the first” compares the two models document by document, which is sharper than "
        "comparing their intervals: where its interval holds 0, these documents do not tell them apart.",
        "Prefill and decode are medians at the longest context that every architecture has a time for, so "
        "that a row is comparable with its neighbours; other contexts are under “Cost against context”.",
    ]
    if len({point.seed for point in results.points}) > 1:
        notes.append(
            "Several seeds: numbers are means over seeds and ± is the sample standard deviation between "
            "them. Interval ends of bits per byte are means too. Needle examples of all seeds are pooled; in "
            "their intervals and in those of differences, the seed is the unit of replication."
        )
    return notes
