"""Draw a prepared plot as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from reports.draw.plot import Axis, Curve, Plot
from reports.draw.style import (
    MUTED,
    Picture,
    context_axis,
    drawing,
    legend,
    log_axis,
    mark_trained,
    new_figure,
    position_axis,
    save,
)


def draw(plot: Plot, output: Path) -> Picture:
    """Write `<output>/<name>.png` and return the figure for the page."""
    circle = Line2D([], [], color=MUTED, marker="o", mfc="none", ms=8, ls="", label=plot.circle_label)
    with drawing():
        figure, axes = new_figure()
        for curve in plot.curves:
            _draw_curve(axes, curve, plot.style)
        for curve in plot.circled:
            _draw_circles(axes, curve)
        if plot.level is not None:
            axes.axhline(plot.level, color=MUTED, linestyle="--", linewidth=1)
        _set_x_axis(axes, plot)
        _set_y_axis(axes, plot.y)
        mark_trained(axes, plot.trained_tokens)
        legend(figure, plot.series, [circle] if plot.circled else [], has_lines=plot.style != "markers")
        return save(
            figure,
            output,
            name=plot.name,
            title=plot.title,
            caption=plot.caption,
            alternative_text=plot.alternative_text,
        )


def _draw_curve(axes: Axes, curve: Curve, style: str) -> None:
    """Draw a curve, with its interval as a band."""
    series = curve.series
    if style == "markers":
        axes.plot(curve.x, curve.y, marker=series.marker, color=series.colour, ls="", ms=8, alpha=0.9)
        return
    marker = series.marker if style == "lines with markers" else ""
    axes.plot(curve.x, curve.y, marker=marker, color=series.colour, linestyle=series.line_style)
    if curve.low and curve.high:
        axes.fill_between(curve.x, curve.low, curve.high, color=series.colour, alpha=0.06, linewidth=0)


def _draw_circles(axes: Axes, curve: Curve) -> None:
    axes.plot(
        curve.x,
        curve.y,
        linestyle="",
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgewidth=1.6,
        markeredgecolor=curve.series.colour,
        zorder=5,
    )


def _set_x_axis(axes: Axes, plot: Plot) -> None:
    values = [x for curve in plot.curves for x in curve.x]
    if plot.x.scale == "contexts":
        context_axis(axes, values)
    elif plot.x.scale == "positions":
        position_axis(axes, values)
    elif plot.x.scale == "log":
        log_axis(axes, plot.x.label, "x")
    axes.set_xlabel(plot.x.label)


def _set_y_axis(axes: Axes, axis: Axis) -> None:
    if axis.scale == "log":
        log_axis(axes, axis.label)
    axes.set_ylabel(axis.label)
    if axis.limits:
        axes.set_ylim(axis.limits)
