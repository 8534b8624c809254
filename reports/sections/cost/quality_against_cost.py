"""Quality against cost, one marker per architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping

from reports.draw.numbers import integer
from reports.draw.plot import PERCENT_AXIS, Axis, Curve, Plot
from reports.results.load import Results
from reports.results.queries import cost_map
from reports.results.ranking import Ranking, make_ranking
from reports.sections.base import Section

#: Series key -> number, None where it is missing.
Values = Mapping[tuple[str, str], float | None]


def section(results: Results) -> Section:
    """Return the section; it says so where no architecture has both a quality and a cost."""
    figures = quality_plots(results)
    notes = [] if figures else ["No architecture has both a quality and a cost."]
    return Section(anchor="quality-cost", title="Quality against cost", notes=notes, figures=figures)


def quality_plots(results: Results) -> list[Plot]:
    """Prepare loss against times and FLOPs, and the needle against state, at the cells of the ranking."""
    ranking = make_ranking(results)
    bits: Values = {row.series.key: row.number("bits_per_byte") for row in ranking.rows}
    bits_axis = Axis(label=f"bits per byte at {integer(ranking.cells.context_tokens)} tokens")
    plots = []
    for phase, what in (("prefill", "ms per prompt"), ("decode", "ms per token")):
        at = integer(ranking.cells.phase_context_tokens[phase])
        times: Values = {row.series.key: row.number(f"{phase}_ms") for row in ranking.rows}
        title = f"Loss against {phase} time"
        plots.append(
            _plot(ranking, f"quality_{phase}", title, times, f"{what} at {at} tokens", bits, bits_axis)
        )
    flops, flops_label = _flops(results, ranking)
    plots.append(
        _plot(ranking, "quality_flops", "Loss against arithmetic", flops, flops_label, bits, bits_axis)
    )
    state: Values = {row.series.key: row.number("state_bytes") for row in ranking.rows}
    state_label = f"state bytes at {integer(ranking.cells.state_context_tokens)} tokens"
    beyond: Values = {
        row.series.key: None if (value := row.number("needle_beyond")) is None else 100 * value
        for row in ranking.rows
    }
    title = "Needle beyond the trained lengths against state"
    plots.append(_plot(ranking, "needle_state", title, state, state_label, beyond, PERCENT_AXIS))
    return [plot for plot in plots if plot]


def _flops(results: Results, ranking: Ranking) -> tuple[Values, str]:
    """Return decode FLOPs per token at the first context of the cost card from the ranking's context on, and
    their label."""
    maps = {row.series.key: cost_map(results, row.series, "decode_flops_per_token") for row in ranking.rows}
    least = ranking.cells.context_tokens or 0
    known = sorted({x for curve in maps.values() for x in curve})
    context = next((x for x in known if x >= least), known[-1] if known else math.nan)
    label = f"FLOPs per decoded token at {integer(context)} tokens"
    return {key: curve.get(context) for key, curve in maps.items()}, label


def _plot(
    ranking: Ranking, name: str, title: str, costs: Values, cost_label: str, quality: Values, y: Axis
) -> Plot | None:
    curves = [
        Curve(series=series, x=[x], y=[value])
        for series in sorted((row.series for row in ranking.rows), key=lambda series: series.label.lower())
        if (x := costs[series.key]) and (value := quality[series.key]) is not None
    ]
    if not curves:
        return None
    better = "lower" if y is not PERCENT_AXIS else "upper"
    return Plot(
        name=name,
        title=title,
        caption=f"{y.label[0].upper()}{y.label[1:]} against {cost_label} (log axis), one marker per "
        f"architecture; the {better} left corner is best.",
        x=Axis(label=cost_label, scale="log"),
        y=y,
        curves=curves,
        style="markers",
    )
