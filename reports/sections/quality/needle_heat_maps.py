"""Needle heat maps: one an architecture, all on one colour scale, failures hatched and named."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reports.draw.numbers import SHORT_STATUS_WORDS, STATUS_WORDS, percent, tokens_tick
from reports.draw.style import INK, MUTED, Picture, drawing, save, svg_uri
from reports.results.load import Results, is_number
from reports.results.queries import contexts_of, trained_contexts
from reports.results.series import Series

COLOUR_MAP = "cividis"
COLUMNS = 4
MAX_WRITTEN_CELLS = 80
#: About the width of a panel without its labels.
CELLS_WIDTH_POINTS = 160.0
EMPTY = "#f0f2f4"


class Grid:
    """One architecture's cells over the contexts and depths of the whole experiment.

    accuracy, status: (context, depth) -> mean over seeds, and what failed where no seed has one."""

    def __init__(self, results: Results, series: Series, contexts: list[float], depths: list[float]) -> None:
        self.series, self.contexts, self.depths = series, contexts, depths
        self.trained = trained_contexts(results)
        values: dict[tuple[float, float], list[float]] = {}
        self.status: dict[tuple[float, float], str] = {}
        for point in results.of("needle"):
            if (point.arch, point.size) != series.key:
                continue
            accuracy = point.metrics.get("accuracy")
            for position in self._positions(point.cell):
                if point.status != "ok":
                    self.status[position] = point.status
                elif is_number(accuracy):
                    values.setdefault(position, []).append(float(accuracy))
        self.accuracy = {position: sum(found) / len(found) for position, found in values.items()}

    def _positions(self, cell: dict[str, object]) -> list[tuple[float, float]]:
        """The cells a point covers: one, or a row or column or all where a coordinate is absent."""
        context, depth = cell.get("context_tokens"), cell.get("depth")
        return [
            (x, y)
            for x in self.contexts
            for y in self.depths
            if (context is None or context == x) and (depth is None or depth == y)
        ]

    def description(self) -> str:
        """The panel in words, a row a context."""
        rows = []
        for context in self.contexts:
            known = [self.accuracy[context, y] for y in self.depths if (context, y) in self.accuracy]
            failed = {
                SHORT_STATUS_WORDS[self.status[context, y]]
                for y in self.depths
                if (context, y) in self.status
            }
            words = [f"{percent(min(known))} to {percent(max(known))}"] if known else []
            rows.append(f"{context:,.0f} tokens {' and '.join([*words, *sorted(failed)]) or 'not measured'}")
        return f"{self.series.label}: " + "; ".join(rows)


def make_grids(results: Results) -> list[Grid]:
    """One an architecture that the needle was tried on."""
    contexts = contexts_of(results, "needle")
    depths = sorted({float(p.cell["depth"]) for p in results.of("needle") if is_number(p.cell.get("depth"))})
    tried = {(point.arch, point.size) for point in results.of("needle")}
    if not contexts or not depths:
        return []
    return [Grid(results, series, contexts, depths) for series in results.series if series.key in tried]


def heat_map_panels(grids: list[Grid]) -> list[tuple[Series, str, str]]:
    """(series, data URI, alternative text) of each panel, for a page that arranges them itself."""
    panels = []
    with drawing():
        for grid in grids:
            figure = Figure(figsize=(2.9, 2.15))
            figure.subplots_adjust(left=0.2, right=0.99, bottom=0.2, top=0.87)
            draw_panel(figure.add_subplot(), grid)
            panels.append((grid.series, svg_uri(figure), grid.description()))
    return panels


def heat_map_figure(grids: list[Grid], output: Path) -> Picture | None:
    """All panels in one figure with the colour scale, for print."""
    if not grids:
        return None
    num_columns = min(COLUMNS, len(grids))
    num_rows = -(-len(grids) // num_columns)
    with drawing():
        figure = Figure(figsize=(2.75 * num_columns + 0.9, 2.25 * num_rows))
        width = 1 - 0.9 / (2.75 * num_columns + 0.9)
        all_axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
        for axes, grid in zip(all_axes, grids, strict=False):
            draw_panel(axes, grid)
        for axes in all_axes[len(grids) :]:
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
            name="needle_heat_maps",
            title="Needle heat maps",
            caption="Exact-match accuracy in percent by context length (across) and depth of the needle "
            "(down, 0% is the start). A bar below a column marks a trained length; hatched cells failed "
            "as named.",
            alternative_text="Needle accuracy by context and depth, a panel an architecture.",
            is_on_page=False,
        )


def draw_panel(axes: Axes, grid: Grid) -> None:
    """One heat map; the colours run from 0 to 1 whatever the values. A panel that failed as a whole
    says so once."""
    num_columns, num_rows = len(grid.contexts), len(grid.depths)
    statuses = set(grid.status.values())
    is_all_failed = not grid.accuracy and len(statuses) == 1 and len(grid.status) == num_columns * num_rows
    is_written = num_columns * num_rows <= MAX_WRITTEN_CELLS and not is_all_failed
    for column, context in enumerate(grid.contexts):
        for row, depth in enumerate(grid.depths):
            _draw_cell(axes, grid, (column, row), (context, depth), is_written)
        if context in grid.trained:
            across = axes.get_xaxis_transform()  # the bar's distance is one of the panel, not of a row
            ends = (column - 0.46, column + 0.46)
            axes.plot(ends, (-0.02, -0.02), color=INK, lw=2.2, clip_on=False, transform=across)
    if is_all_failed:
        _write(axes, ((num_columns - 1) / 2, (num_rows - 1) / 2), STATUS_WORDS[statuses.pop()], INK, 10, True)
    axes.grid(False)
    axes.set_xlim(-0.5, num_columns - 0.5)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.set_xticks(range(num_columns), [tokens_tick(x) for x in grid.contexts], fontsize=7.5)
    axes.set_yticks(range(num_rows), [percent(y) for y in grid.depths], fontsize=7.5)
    axes.tick_params(length=0, pad=5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(grid.series.label, color=INK, fontsize=9.5, pad=5)
    axes.set_xlabel("context (tokens)", fontsize=7.5)
    axes.set_ylabel("depth", fontsize=7.5)


def _draw_cell(
    axes: Axes, grid: Grid, place: tuple[int, int], position: tuple[float, float], is_written: bool
) -> None:
    value, status = grid.accuracy.get(position), grid.status.get(position)
    corner = (place[0] - 0.5, place[1] - 0.5)
    space = CELLS_WIDTH_POINTS / len(grid.contexts)
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
