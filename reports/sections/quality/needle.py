"""Needle in a haystack."""

from __future__ import annotations

from pathlib import Path

from reports.draw.curves import PERCENT_LIMITS, Line, token_curves
from reports.draw.numbers import MISSING, fixed, integer
from reports.draw.style import Picture
from reports.draw.table import Column, Table, name_cell, pooled_cell
from reports.results.load import Results, is_number
from reports.results.queries import chance_accuracy, contexts_of, status_of, trained_contexts
from reports.results.statistics import pool


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
    return token_curves(
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
    return token_curves(
        results,
        output,
        lines,
        name="needle_log_probability",
        title="Certainty of the right answer",
        y_label="log-probability of the answer (nats)",
        caption="Mean log-probability in nats of the whole right answer, over all depths, against context "
        "length; 0 is certainty. It tells models apart that all answer wrongly.",
    )


def needle_table(results: Results) -> Table:
    """Accuracy over all depths and the answer's log-probability at every context length."""
    contexts, trained = contexts_of(results, "needle"), trained_contexts(results)
    rows = []
    for series in results.series:
        points = [point for point in results.of("needle") if (point.arch, point.size) == series.key]
        cells = [name_cell(series)]
        for context in contexts:
            here = [point for point in points if point.cell.get("context_tokens") == context]
            cell = pooled_cell(pool(here), status_of(results, series, "needle", context))
            nats = [p.metrics.get("answer_log_probability_nats") for p in here]
            known = [float(value) for value in nats if is_number(value)]
            if known:
                cell.note += f" log p {fixed(sum(known) / len(known), 2)}"
            cells.append(cell)
        rows.append(cells)
    chance = chance_accuracy(results)
    examples = sorted(
        {int(p.metrics["num_examples"] or 0) for p in results.ok("needle") if p.metrics.get("num_examples")}
    )
    count = (
        " to ".join(dict.fromkeys(integer(value) for value in (examples[0], examples[-1])))
        if examples
        else MISSING
    )
    return Table(
        name="needle",
        caption="Exact match over all depths with its Wilson 95% interval, and the mean log-probability of "
        f"the answer in nats. {count} examples a cell of the grid; chance is "
        f"{'not recorded' if chance is None else f'{100 * chance:.3g}%'}.",
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(
                Column(title=integer(x), unit="tokens, trained" if x in trained else "tokens, beyond")
                for x in contexts
            ),
        ],
        rows=rows,
    )
