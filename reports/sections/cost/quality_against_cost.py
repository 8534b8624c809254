"""Quality against cost."""

from __future__ import annotations

import math
from pathlib import Path

from reports.draw.curves import PERCENT_LIMITS
from reports.draw.numbers import integer, joined
from reports.draw.style import Picture, drawing, legend, log_axis, new_figure, save
from reports.results.load import Results
from reports.results.queries import cost_map
from reports.results.ranking import Ranking


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
