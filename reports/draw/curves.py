"""The report's quality curves, and what all its curves share.

Every function draws one picture, writes its PNG and returns it; None where there is nothing to draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from harness.record.schema import Point
from reports.draw.numbers import integer, joined
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
from reports.results.load import Results, is_number
from reports.results.series import Series
from reports.results.statistics import pool
from reports.sections.quality.tables import chance_accuracy, contexts_of, longest_trained

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


def loss_by_context(results: Results, output: Path) -> Picture | None:
    """Bits per byte against context length."""
    frame = results.table("perplexity")
    if "bits_per_byte" not in frame:
        return None
    lines = []
    for series in results.series:
        own = frame[(frame["arch"] == series.arch) & (frame["size"] == series.size)]
        own = own.dropna(subset=["bits_per_byte"]).sort_values("context_tokens")
        if own.empty:
            continue
        ends = [
            own[name].tolist() if name in own and own[name].notna().all() else None
            for name in ("bits_per_byte_low", "bits_per_byte_high")
        ]
        values = (own["context_tokens"].tolist(), own["bits_per_byte"].tolist())
        lines.append(Line(series=series, x=values[0], y=values[1], low=ends[0], high=ends[1]))
    return _curves(
        results,
        output,
        lines,
        name="bits_per_byte_by_context",
        title="Loss against context",
        y_label="bits per byte",
        caption="Bits per byte on test documents against the tokens of context (log axis); lower is better. "
        "Bands are 95% bootstrap intervals over documents.",
    )


def loss_by_position(results: Results, output: Path) -> Picture | None:
    """Mean loss by position bucket, at the longest context each architecture was measured at."""
    lines, contexts = [], set()
    for series in results.series:
        points = [p for p in results.samples(series, "perplexity") if p.samples.get("bucket_loss_nats")]
        longest = max((p.cell.get("context_tokens", 0) for p in points), default=0)
        curve = _bucket_means([p for p in points if p.cell.get("context_tokens", 0) == longest])
        if curve:
            contexts.add(longest)
            lines.append(Line(series=series, x=list(curve), y=list(curve.values())))
    at = " or ".join(integer(context) for context in sorted(contexts))
    return _curves(
        results,
        output,
        lines,
        name="loss_by_position",
        title="Loss against position",
        y_label="nats a token",
        is_position=True,
        caption=f"Mean loss in nats a token by position bucket, drawn at its last position; documents read "
        f"with {at} tokens of context; lower is better. A curve that keeps falling uses what it read.",
    )


def _bucket_means(points: list[Point]) -> dict[float, float]:
    """Last position of each bucket -> mean over seeds; buckets without tokens are left out."""
    values: dict[float, list[float]] = {}
    for point in points:
        ends, losses = point.samples.get("bucket_end_tokens") or [], point.samples["bucket_loss_nats"]
        for end, loss in zip(ends, losses, strict=False):
            if is_number(end) and is_number(loss) and end > 0:
                values.setdefault(float(end), []).append(float(loss))
    return {end: sum(found) / len(found) for end, found in sorted(values.items())}


def needle_by_context(results: Results, output: Path) -> Picture | None:
    """Needle accuracy over all depths against context length."""
    lines = []
    for series in results.series:
        points = [p for p in results.of("needle") if (p.arch, p.size) == series.key]
        pooled = {
            context: pool(p for p in points if p.cell.get("context_tokens") == context)
            for context in contexts_of(results, "needle")
        }
        known = {context: entry for context, entry in pooled.items() if entry}
        if known:
            lines.append(
                Line(
                    series=series,
                    x=list(known),
                    y=[100 * entry.accuracy for entry in known.values()],
                    low=[100 * entry.low for entry in known.values()],
                    high=[100 * entry.high for entry in known.values()],
                )
            )
    chance = chance_accuracy(results)
    return _curves(
        results,
        output,
        lines,
        name="needle_by_context",
        title="Needle against context",
        y_label="exact match (%)",
        caption="Share of needles recalled exactly, over all depths, against context length (log axis); "
        "higher is better. Bands are Wilson 95% intervals over examples."
        + (" The dashed line is chance." if chance is not None else ""),
        level=None if chance is None else 100 * chance,
        y_limits=PERCENT_LIMITS,
    )


def needle_log_probability(results: Results, output: Path) -> Picture | None:
    """Mean log-probability of the right answer against context length."""
    lines = []
    for series in results.series:
        values: dict[float, list[float]] = {}
        for point in results.samples(series, "needle"):
            nats, context = point.metrics.get("answer_log_probability_nats"), point.cell.get("context_tokens")
            if is_number(nats) and is_number(context):
                values.setdefault(float(context), []).append(float(nats))
        if values:
            means = [sum(values[x]) / len(values[x]) for x in sorted(values)]
            lines.append(Line(series=series, x=sorted(values), y=means))
    return _curves(
        results,
        output,
        lines,
        name="needle_log_probability",
        title="Certainty of the right answer",
        y_label="log-probability of the answer (nats)",
        caption="Mean log-probability in nats of the whole right answer, over all depths, against context "
        "length; 0 is certainty. It tells models apart that all answer wrongly.",
    )


def _curves(
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
