"""Write tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from reports.draw.table import Table


def table_lines(table: Table) -> list[str]:
    """Return a table's caption and its rows; small print follows a cell's text."""
    titles = [" ".join(filter(None, (column.title, column.unit))) for column in table.columns]
    rows = [[" ".join(filter(None, (cell.text, cell.note.strip()))) for cell in row] for row in table.rows]
    return [table.caption, "", *row_lines(titles, rows)]


def row_lines(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, and an empty one."""
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [*lines, ""]
