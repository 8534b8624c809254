"""Curves over context, position or step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from reports.draw.numbers import joined
from reports.draw.style import (
    MUTED,
    Picture,
    context_axis,
    drawing,
    legend,
    mark_trained,
    new_figure,
    position_axis,
    save,
)
from reports.results.load import Results
from reports.results.queries import longest_trained
from reports.results.series import Series

PERCENT_LIMITS = (-3, 103)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series' values over x, and the ends of their intervals where known."""

    series: Series
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def names_of(lines: list[Line]) -> str:
    """The architectures in a picture, for its alternative text."""
    return joined([line.series.label for line in lines])


def plot(axes: Axes, line: Line, *, has_markers: bool = True) -> None:
    """Draws a line, with its interval as a band."""
    series = line.series
    marker = series.marker if has_markers else ""
    axes.plot(line.x, line.y, marker=marker, color=series.colour, linestyle=series.line_style)
    if line.low and line.high:
        axes.fill_between(line.x, line.low, line.high, color=line.series.colour, alpha=0.06, linewidth=0)


def distinct(lines: list[Line]) -> list[Series]:
    """Return the series of the lines, each one once."""
    return list({line.series.key: line.series for line in lines}.values())


def token_curves(
    results: Results,
    output: Path,
    lines: list[Line],
    *,
    name: str,
    title: str,
    y_label: str,
    caption: str,
    is_position: bool = False,
    level: float | None = None,
    y_limits: tuple[float, float] | None = None,
) -> Picture | None:
    """Quality curves over a logarithmic token axis, the longest trained length marked."""
    if not lines:
        return None
    x_name = "position" if is_position else "context"
    with drawing():
        figure, axes = new_figure()
        for line in lines:
            plot(axes, line)
        if level is not None:
            axes.axhline(level, color=MUTED, linestyle="--", linewidth=1)
        (position_axis if is_position else context_axis)(axes, [x for line in lines for x in line.x])
        axes.set_ylabel(y_label)
        if y_limits:
            axes.set_ylim(y_limits)
        mark_trained(axes, longest_trained(results))
        legend(figure, [line.series for line in lines])
        return save(
            figure,
            output,
            name=name,
            title=title,
            caption=caption,
            alternative_text=f"{title}: {y_label} against {x_name} in tokens, a line each for "
            f"{names_of(lines)}.",
        )
