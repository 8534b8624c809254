"""Write the ranking as a few lines of text, for the end of a run in a terminal."""

from __future__ import annotations

from pathlib import Path

from reports.draw.numbers import MISSING, SHORT_STATUS_WORDS, integer, number_text
from reports.results.load import Results, load
from reports.results.ranking import Ranking, make_ranking

WIDTH = 100


def ranking_text(folder: Path) -> str:
    """Return a ranking of at most 100 columns, in the report's order. Raises ReportError as `load` does."""
    results = load([folder])
    ranking = make_ranking(results)
    lines = [*_table_lines(ranking), *_legend_lines(ranking), *_failure_lines(results)]
    return "\n".join(line[:WIDTH] for line in lines)


def _table_lines(ranking: Ranking) -> list[str]:
    """Return the heads, a rule and one line per architecture.

    Where the width does not suffice, names are cut and not numbers."""
    columns = [column for column in ranking.columns if column.short]
    heads = ["#", "architecture", *(column.short for column in columns)]
    lines = []
    for place, row in enumerate(ranking.rows, start=1):
        texts = []
        for column in columns:
            value = row.values[column.name]
            status = SHORT_STATUS_WORDS[value.status] if value.status else MISSING
            texts.append(status if value.value is None else number_text(value.value, column.unit))
        has_place = row.number("bits_per_byte") is not None
        lines.append([str(place) if has_place else MISSING, row.series.label, *texts])
    widths = [max(map(len, texts)) for texts in zip(heads, *lines, strict=True)]
    widths[1] = min(widths[1], WIDTH - sum(widths) - 2 * (len(widths) - 1) + widths[1])
    for line in lines:
        line[1] = line[1] if len(line[1]) <= widths[1] else line[1][: widths[1] - 1] + "…"
    return [
        "  ".join(
            cell.ljust(width) if index == 1 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (heads, ["-" * width for width in widths], *lines)
    ]


def _legend_lines(ranking: Ranking) -> list[str]:
    contexts = [(column.legend, column.at(ranking.cells)) for column in ranking.columns if column.legend]
    known = [legend.format(tokens=integer(context)) for legend, context in contexts if context is not None]
    return ["; ".join(known) + "."] if known else []


def _failure_lines(results: Results) -> list[str]:
    lines = []
    if failures := results.failures():
        cells = "cells" if len(failures) > 1 else "cell"
        lines.append(
            f"{len(failures)} {cells} gave no number; the report says why. retry_failed=true tries again."
        )
    if results.damaged_lines:
        lines.append(f"Damaged record lines: {len(results.damaged_lines)}; the report names them.")
    return lines
