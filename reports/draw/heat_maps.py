"""Draw accuracy over context and depth: one heat map per architecture, all on one colour scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reports.draw.numbers import SHORT_STATUS_WORDS, STATUS_WORDS, percent, tokens_tick
from reports.draw.plot import HeatMap, HeatMaps
from reports.draw.style import INK, MUTED, Picture, drawing, save, svg_uri

COLOUR_MAP = "cividis"
COLUMNS = 4
MAX_WRITTEN_CELLS = 80
#: About the width of a panel without its labels.
CELLS_WIDTH_POINTS = 160.0
EMPTY = "#f0f2f4"


@dataclass(frozen=True, kw_only=True)
class Panels:
    """Drawn heat maps.

    panels:  (data URI, the heat map in words) of each.
    whole:   all of them in one PNG.
    colours: the colour scale, from 0 to 1 in steps of 0.1.
    """

    panels: list[tuple[str, str]]
    whole: Picture
    colours: list[str]


def draw_heat_maps(heat_maps: HeatMaps, output: Path) -> Panels:
    """Write `<output>/<name>.png` with all heat maps, and return them for the page."""
    return Panels(
        panels=[(_panel(one), one.description) for one in heat_maps.maps],
        whole=_figure(heat_maps, output),
        colours=[to_hex(colormaps[COLOUR_MAP](step / 10)) for step in range(11)],
    )


def _panel(one: HeatMap) -> str:
    """Return one heat map as a data URI."""
    with drawing():
        figure = Figure(figsize=(2.9, 2.15))
        figure.subplots_adjust(left=0.2, right=0.99, bottom=0.2, top=0.87)
        _draw(figure.add_subplot(), one)
        return svg_uri(figure)


def _figure(heat_maps: HeatMaps, output: Path) -> Picture:
    """Draw all heat maps in one figure with the colour scale, for print."""
    maps = heat_maps.maps
    num_columns = min(COLUMNS, len(maps))
    num_rows = -(-len(maps) // num_columns)
    with drawing():
        figure = Figure(figsize=(2.75 * num_columns + 0.9, 2.25 * num_rows))
        width = 1 - 0.9 / (2.75 * num_columns + 0.9)
        all_axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
        for axes, one in zip(all_axes, maps, strict=False):
            _draw(axes, one)
        for axes in all_axes[len(maps) :]:
            axes.set_axis_off()
        edge = 0.3 / num_rows
        figure.subplots_adjust(
            left=0.05 + 0.1 / num_columns, right=width, bottom=edge, top=1 - edge / 2, wspace=0.32, hspace=0.5
        )
        scale = ScalarMappable(norm=Normalize(0, 100), cmap=COLOUR_MAP)
        bar = figure.add_axes((width + 0.015, 0.3, 0.012, 0.4))
        figure.colorbar(scale, cax=bar, label="exact match (%)")
        return save(
            figure,
            output,
            name=heat_maps.name,
            title=heat_maps.title,
            caption=heat_maps.caption,
            alternative_text=f"{heat_maps.title}, one panel per architecture.",
            is_on_page=False,
        )


def _draw(axes: Axes, one: HeatMap) -> None:
    """Draw one heat map. Colours run from 0 to 1 whatever the values; where every cell failed alike, that is
    written once."""
    num_columns, num_rows = len(one.contexts), len(one.depths)
    statuses = set(one.status.values())
    is_all_failed = not one.accuracy and len(statuses) == 1 and len(one.status) == num_columns * num_rows
    is_written = num_columns * num_rows <= MAX_WRITTEN_CELLS and not is_all_failed
    for column, context in enumerate(one.contexts):
        for row, depth in enumerate(one.depths):
            _draw_cell(axes, one, (column, row), (context, depth), is_written)
        if context in one.trained:
            across = axes.get_xaxis_transform()  # the bar's distance is one of the panel, not of a row
            ends = (column - 0.46, column + 0.46)
            axes.plot(ends, (-0.02, -0.02), color=INK, lw=2.2, clip_on=False, transform=across)
    if is_all_failed:
        _write(axes, ((num_columns - 1) / 2, (num_rows - 1) / 2), STATUS_WORDS[statuses.pop()], INK, 10, True)
    axes.grid(False)
    axes.set_xlim(-0.5, num_columns - 0.5)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.set_xticks(range(num_columns), [tokens_tick(x) for x in one.contexts], fontsize=7.5)
    axes.set_yticks(range(num_rows), [percent(y) for y in one.depths], fontsize=7.5)
    axes.tick_params(length=0, pad=5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(one.series.label, color=INK, fontsize=9.5, pad=5)
    axes.set_xlabel("context (tokens)", fontsize=7.5)
    axes.set_ylabel("depth", fontsize=7.5)


def _draw_cell(
    axes: Axes, one: HeatMap, place: tuple[int, int], position: tuple[float, float], is_written: bool
) -> None:
    value, status = one.accuracy.get(position), one.status.get(position)
    corner = (place[0] - 0.5, place[1] - 0.5)
    space = CELLS_WIDTH_POINTS / len(one.contexts)
    if value is not None:
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=colormaps[COLOUR_MAP](value), edgecolor="white"))
        if is_written:
            _write(axes, place, f"{100 * value:.0f}", "white" if value < 0.55 else INK, min(7.5, space / 2.4))
    elif status is not None:
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=EMPTY, edgecolor="#a0a7ae", hatch="////"))
        word = SHORT_STATUS_WORDS[status]
        if is_written:
            _write(axes, place, word, INK, min(7.5, 1.5 * space / len(word)), True)
    else:
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=EMPTY, edgecolor="white"))
        _write(axes, place, "–", MUTED, 7)


def _write(
    axes: Axes, place: tuple[float, float], text: str, colour: str, size: float, has_box: bool = False
) -> None:
    box = {"facecolor": EMPTY, "edgecolor": "none", "pad": 0.8} if has_box else None
    axes.text(*place, text, ha="center", va="center", color=colour, fontsize=size, bbox=box)
