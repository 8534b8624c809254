"""Costs against context with their crossovers, and quality against cost."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.lines import Line2D

from reports.draw.curves import PERCENT_LIMITS, Line, names_of, plot
from reports.draw.numbers import integer, joined
from reports.draw.style import MUTED, Picture, context_axis, drawing, legend, log_axis, new_figure, save
from reports.results.load import Results
from reports.results.ranking import Ranking, cost_map
from reports.sections.cost.cost import CostCurves


def cost_figure(results: Results, entry: CostCurves, output: Path) -> Picture | None:
    """One cost against context on log axes, crossovers with the Transformer circled. A zero, such as
    memory too little to show, has no place on such an axis and is left out."""
    lines = [
        Line(series=series, x=list(drawn), y=list(drawn.values()))
        for series in results.series
        if (drawn := {x: y for x, y in sorted(entry.curves.get(series.key, {}).items()) if y > 0})
    ]
    if not lines:
        return None
    crossings = {series.label: entry.crossings(series, results.series) for series in results.series}
    with drawing():
        figure, axes = new_figure()
        for line in lines:
            plot(axes, line)
        for series in results.series:
            for crossing in crossings[series.label]:
                axes.plot(
                    crossing.context_tokens,
                    crossing.value,
                    marker="o",
                    markersize=9,
                    markerfacecolor="none",
                    markeredgewidth=1.6,
                    markeredgecolor=series.colour,
                    zorder=5,
                )
        context_axis(axes, [x for line in lines for x in line.x])
        log_axis(axes, entry.cost.axis)
        circle = Line2D([], [], color=MUTED, marker="o", mfc="none", ms=8, ls="", label="crosses Transformer")
        num_crossings = sum(len(found) for found in crossings.values())
        legend(figure, [line.series for line in lines], [circle] if num_crossings else [])
        batch = f", batch {integer(entry.batch_size)}" if entry.cost.phase else ""
        found = f"{num_crossings} crossover{'s' if num_crossings != 1 else ''} with the Transformer circled"
        return save(
            figure,
            output,
            name=f"{entry.cost.name}_batch{entry.batch_size:g}" if entry.cost.phase else entry.cost.name,
            title=f"{entry.cost.title}{batch}",
            caption=f"{entry.cost.title} ({entry.cost.axis}{batch}) against context, both axes logarithmic; "
            f"lower is better; {found if num_crossings else 'no curve crosses the Transformer’s'}.",
            alternative_text=f"{entry.cost.title} against context in tokens, a line each for "
            f"{names_of(lines)}; {found}.",
        )


def scatter_figures(results: Results, ranking: Ranking, output: Path) -> list[Picture]:
    """Quality against cost: one point an architecture."""
    bits = {row.series.key: row.numbers["bits_per_byte"] for row in ranking.rows}
    bits_label = f"bits per byte at {integer(ranking.context_tokens)} tokens"
    beyond = {
        row.series.key: None if row.needle_beyond is None else 100 * row.needle_beyond.accuracy
        for row in ranking.rows
    }
    panels: list[
        tuple[str, str, dict[tuple[str, str], float | None], str, dict[tuple[str, str], float | None], str]
    ]
    panels = []
    for phase, what in (("prefill", "ms a prompt"), ("decode", "ms a token")):
        times = {row.series.key: row.numbers[f"{phase}_ms"] for row in ranking.rows}
        at = integer(ranking.phase_context_tokens[phase])
        panels.append(
            (
                f"quality_{phase}",
                f"Loss against {phase} time",
                times,
                f"{what} at {at} tokens",
                bits,
                bits_label,
            )
        )
    flops, flops_at = _flops_at(results, ranking)
    panels.append(
        (
            "quality_flops",
            "Loss against arithmetic",
            flops,
            f"FLOPs a decoded token at {flops_at}",
            bits,
            bits_label,
        )
    )
    state = {row.series.key: row.numbers["state_bytes"] for row in ranking.rows}
    state_label = f"state bytes at {integer(ranking.state_context_tokens)} tokens"
    panels.append(
        (
            "needle_state",
            "Needle beyond the trained lengths against state",
            state,
            state_label,
            beyond,
            "exact match (%)",
        )
    )
    pictures = [_scatter(ranking, output, *panel) for panel in panels]
    return [picture for picture in pictures if picture]


def _flops_at(results: Results, ranking: Ranking) -> tuple[dict[tuple[str, str], float | None], str]:
    """Decode FLOPs a token at the first context of the cost card from the ranking's context on."""
    maps = {row.series.key: cost_map(results, row.series, "decode_flops_per_token") for row in ranking.rows}
    least = ranking.context_tokens or 0
    known = sorted({x for curve in maps.values() for x in curve})
    context = next((x for x in known if x >= least), known[-1] if known else math.nan)
    return {key: curve.get(context) for key, curve in maps.items()}, f"{integer(context)} tokens"


def _scatter(
    ranking: Ranking,
    output: Path,
    name: str,
    title: str,
    x: dict[tuple[str, str], float | None],
    x_label: str,
    y: dict[tuple[str, str], float | None],
    y_label: str,
) -> Picture | None:
    marks = [
        (series, cost, quality)
        for series in sorted((row.series for row in ranking.rows), key=lambda series: series.label.lower())
        if (cost := x[series.key]) and (quality := y[series.key]) is not None
    ]
    if not marks:
        return None
    shown = [series for series, _, _ in marks]
    with drawing():
        figure, axes = new_figure()
        for series, cost, quality in marks:
            axes.plot(cost, quality, marker=series.marker, color=series.colour, ls="", ms=8, alpha=0.9)
        log_axis(axes, x_label, "x")
        axes.set_ylabel(y_label)
        if "%" in y_label:
            axes.set_ylim(PERCENT_LIMITS)
        legend(figure, shown, has_lines=False)
        better = "lower" if y_label.startswith("bits") else "upper"
        return save(
            figure,
            output,
            name=name,
            title=title,
            caption=f"{y_label[0].upper()}{y_label[1:]} against {x_label} (log axis), one mark an "
            f"architecture; the {better} left corner is best.",
            alternative_text=f"{title}: a mark each for {joined([series.label for series in shown])}.",
        )
