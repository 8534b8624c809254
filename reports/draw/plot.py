"""Figures as plain data: what is shown, before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reports.draw.numbers import SHORT_STATUS_WORDS, joined, percent
from reports.results.series import Series


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis of a plot.

    label: with the unit, which also decides how ticks are written (bytes, FLOPs).
    scale: "contexts" is logarithmic with a tick at each measured context, "positions" logarithmic with ticks
           at powers of two.
    limits: the ends, where they do not follow from the values.
    """

    label: str
    scale: Literal["linear", "log", "contexts", "positions"] = "linear"
    limits: tuple[float, float] | None = None


CONTEXT_AXIS = Axis(label="context (tokens)", scale="contexts")
POSITION_AXIS = Axis(label="position in the document (tokens)", scale="positions")
PERCENT_AXIS = Axis(label="exact match (%)", limits=(-3, 103))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The values of a series over x, and the ends of their intervals where they are known."""

    series: Series
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Curves over two axes.

    name:           of the PNG, without its ending.
    caption:        what is seen, with units.
    style:          lines with a marker at each value, lines alone, or markers alone.
    circled:        points of the curves to draw a circle around; circle_label says why.
    level:          a y to draw a dashed line at.
    trained_tokens: the longest trained length, marked on the x axis.
    """

    name: str
    title: str
    caption: str
    x: Axis
    y: Axis
    curves: list[Curve]
    style: Literal["lines with markers", "lines", "markers"] = "lines with markers"
    circled: list[Curve] = field(default_factory=list)
    circle_label: str = ""
    level: float | None = None
    trained_tokens: float | None = None

    @property
    def series(self) -> list[Series]:
        """Each series that has a curve, once."""
        return list({curve.series.key: curve.series for curve in self.curves}.values())

    @property
    def alternative_text(self) -> str:
        """The figure in words, for readers who cannot see it."""
        what = "marker" if self.style == "markers" else "line"
        names = joined([series.label for series in self.series])
        return f"{self.title}: {self.y.label} against {self.x.label}, one {what} per architecture: {names}."


Position = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Accuracy of one architecture over contexts and depths.

    trained:  the contexts that lie among the trained lengths.
    accuracy: (context, depth) -> mean over seeds.
    status:   (context, depth) -> why there is no accuracy.
    """

    series: Series
    contexts: list[float]
    depths: list[float]
    trained: set[float]
    accuracy: dict[Position, float]
    status: dict[Position, str]

    @property
    def description(self) -> str:
        """The heat map in words, one clause per context."""
        clauses = []
        for context in self.contexts:
            known = [self.accuracy[context, y] for y in self.depths if (context, y) in self.accuracy]
            failed = {
                SHORT_STATUS_WORDS[self.status[context, y]]
                for y in self.depths
                if (context, y) in self.status
            }
            words = [f"{percent(min(known))} to {percent(max(known))}"] if known else []
            found = " and ".join([*words, *sorted(failed)]) or "not measured"
            clauses.append(f"{context:,.0f} tokens {found}")
        return f"{self.series.label}: " + "; ".join(clauses)


@dataclass(frozen=True, kw_only=True)
class HeatMaps:
    """Heat maps that stand side by side: one per architecture, all on one colour scale."""

    name: str
    title: str
    caption: str
    maps: list[HeatMap]
