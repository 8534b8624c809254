"""Section: one part of the page as prepared data. Nothing here is drawn or written."""

from __future__ import annotations

from dataclasses import dataclass, field

from reports.draw.plot import HeatMaps, Plot
from reports.draw.table import Table


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What a reader can unfold: a table, or a note and texts shown as they are."""

    title: str
    table: Table | None = None
    note: str = ""
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    anchor:    unique on the page; links lead to it.
    notes:     sentences before the figures and tables; footnotes come after them.
    texts:     (heading, text shown as it is) after the tables, such as a command.
    """

    anchor: str
    title: str
    notes: list[str] = field(default_factory=list)
    heat_maps: HeatMaps | None = None
    figures: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)


def fold(title: str, table: Table | None) -> list[Folded]:
    """Return the table to unfold; nothing where there is no table."""
    return [] if table is None else [Folded(title=title, table=table)]
