"""How figures look and are saved: light, restrained, the same axes and legend everywhere."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from reports.draw.numbers import bytes_text, scaled, tokens_tick
from reports.results.series import Series

PNG_DOTS_PER_INCH = 220
MAX_LEGEND_LETTERS = 80
INK, MUTED, GRID = "#24292f", "#57606a", "#e5e8eb"
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "longarch",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn figure: its PNG's file name, and the same as an SVG data URI for the page.

    caption: what is seen, with units; alternative_text: the same for who cannot see it."""

    name: str
    title: str
    caption: str
    alternative_text: str
    png_name: str
    data_uri: str


def drawing() -> AbstractContextManager[None]:
    """The style, for the length of a `with` block; nothing global is changed."""
    return matplotlib.rc_context(RC)


def save(
    figure: Figure,
    output: Path,
    *,
    name: str,
    title: str,
    caption: str,
    alternative_text: str,
    is_on_page: bool = True,
) -> Picture:
    """Writes `<output>/<name>.png` at print resolution and returns the figure for the page; its data
    URI is empty where the page shows something else in its place."""
    png = output / f"{name}.png"
    figure.savefig(png, dpi=PNG_DOTS_PER_INCH, metadata={"Software": None})
    figure.set_layout_engine("none")  # laid out once, for both formats
    return Picture(
        name=name,
        title=title,
        caption=caption,
        alternative_text=alternative_text,
        png_name=png.name,
        data_uri=svg_uri(figure) if is_on_page else "",
    )


def svg_uri(figure: Figure) -> str:
    """The figure as a data URI that holds no date and refers to nothing outside itself."""
    buffer = io.StringIO()
    none: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=none)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def context_axis(axes: Axes, contexts: Iterable[float]) -> None:
    """A logarithmic axis with a tick at each measured context, thinned where they crowd."""
    _token_axis(axes, sorted(set(contexts)))
    axes.set_xlabel("context (tokens)")


def position_axis(axes: Axes, positions: Iterable[float]) -> None:
    """A logarithmic axis with ticks at powers of two, whatever the positions measured."""
    measured = list(positions)
    first, last = math.floor(math.log2(min(measured))), math.ceil(math.log2(max(measured)))
    _token_axis(axes, [2.0**power for power in range(first, last + 1)])
    axes.set_xlabel("position in the document (tokens)")


def _token_axis(axes: Axes, ticks: list[float]) -> None:
    axes.set_xscale("log", base=2)
    while len(ticks) > 9:
        ticks = ticks[::-2][::-1]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_tick(value)))


def log_axis(axes: Axes, unit: str, which: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis labelled in words: bytes, FLOPs or plain numbers, by the unit's name."""
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis = axes.yaxis if which == "y" else axes.xaxis
    write = bytes_text if "bytes" in unit else scaled if "FLOPs" in unit else "{:g}".format
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    axis.set_major_locator(FixedLocator(log_ticks(low, high, is_binary="bytes" in unit)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_label_text(unit)


def log_ticks(low: float, high: float, *, is_binary: bool = False) -> list[float]:
    """Round values between two positive ends, four to seven where the range allows: powers of two
    (every second or fourth for a wide range) for bytes, else 1-2-5 or decades; even steps for a
    range too narrow for those."""
    if is_binary:
        exponents = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        step = max(1, -(-len(exponents) // 7))
        ticks = [2.0**power for power in exponents if power % step == 0]
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 4 else (1,)
        ticks = [factor * 10.0**power for power in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        ticks = ticks[:: max(1, -(-len(ticks) // 8))]
    if len(ticks) < 3:
        unit = 1024.0 ** math.floor(math.log(low, 1024)) if is_binary else 1.0
        ticks = [unit * tick for tick in MaxNLocator(5).tick_values(low / unit, high / unit)]
    return [tick for tick in ticks if low <= tick <= high]


def legend(
    figure: Figure, shown: list[Series], extra: list[Line2D] | None = None, *, has_lines: bool = True
) -> None:
    """One legend below the axes, in three columns where the names fit, else in two."""
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker, ls=s.line_style if has_lines else "", label=s.label)
        for s in shown
    ] + (extra or [])
    names = [str(entry.get_label()) for entry in handles]
    rows = -(-len(names) // 3)
    width = sum(max(map(len, names[start : start + rows])) + 9 for start in range(0, len(names), rows))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncol=3 if width <= MAX_LEGEND_LETTERS else 2,
        columnspacing=1.2,
    )


def new_figure() -> tuple[Figure, Axes]:
    """A figure of the report's one size, and its axes. Small, so that its letters are still read on
    a phone."""
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    return figure, figure.add_subplot()


def mark_trained(axes: Axes, longest_tokens: float | None) -> None:
    """A dotted line at the longest trained length, where it lies within the axis."""
    low, high = axes.get_xlim()
    if longest_tokens is None or not low <= longest_tokens <= high:
        return
    axes.axvline(longest_tokens, color=MUTED, linestyle=":", linewidth=1.2, zorder=1)
    axes.annotate(
        "trained up to here",
        (longest_tokens, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, 2),
        textcoords="offset points",
        fontsize=7.5,
        color=MUTED,
    )
