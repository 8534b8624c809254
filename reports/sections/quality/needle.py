"""The needle in a haystack: curves, heat maps and every number."""

from __future__ import annotations

from reports.draw.numbers import MISSING, fixed, integer
from reports.draw.plot import CONTEXT_AXIS, PERCENT_AXIS, Axis, Curve, HeatMap, HeatMaps, Plot, Position
from reports.draw.table import Column, Table, name_cell, pooled_cell
from reports.results.load import Results, is_number
from reports.results.queries import (
    chance_accuracy,
    contexts_of,
    longest_trained,
    pool,
    status_of,
    trained_contexts,
)
from reports.results.series import Series
from reports.sections.base import Section, fold


def section(results: Results) -> Section:
    """Return the section; it says so where the needle was not measured."""
    anchor, title = "needle", "Needle in a haystack"
    if not results.of("needle"):
        return Section(anchor=anchor, title=title, notes=["The needle was not measured."])
    figures = (needle_by_context(results), needle_log_probability(results))
    return Section(
        anchor=anchor,
        title=title,
        notes=[
            "A key and a number are hidden in real text, and the number is asked for at its end. One panel "
            "per architecture, all on one colour scale."
        ],
        heat_maps=needle_heat_maps(results),
        figures=[figure for figure in figures if figure],
        folded=fold("Every number", needle_table(results)),
    )


def needle_by_context(results: Results) -> Plot | None:
    """Prepare accuracy over all depths against context length; None where there is none."""
    curves = []
    for series in results.series:
        points = results.of("needle", series)
        pooled = {
            context: pool(p for p in points if p.cell.get("context_tokens") == context)
            for context in contexts_of(results, "needle")
        }
        known = {context: entry for context, entry in pooled.items() if entry}
        if known:
            curves.append(
                Curve(
                    series=series,
                    x=list(known),
                    y=[100 * entry.accuracy for entry in known.values()],
                    low=[100 * entry.low for entry in known.values()],
                    high=[100 * entry.high for entry in known.values()],
                )
            )
    if not curves:
        return None
    chance = chance_accuracy(results)
    return Plot(
        name="needle_by_context",
        title="Needle against context",
        caption="Share of needles recalled exactly, over all depths, against context length (log axis); "
        "higher is better. Bands are Wilson 95% intervals over examples."
        + (" The dashed line is chance." if chance is not None else ""),
        x=CONTEXT_AXIS,
        y=PERCENT_AXIS,
        curves=curves,
        level=None if chance is None else 100 * chance,
        trained_tokens=longest_trained(results),
    )


def needle_log_probability(results: Results) -> Plot | None:
    """Prepare the mean log-probability of the right answer against context; None where there is none."""
    curves = []
    for series in results.series:
        values: dict[float, list[float]] = {}
        for point in results.samples(series, "needle"):
            nats, context = point.metrics.get("answer_log_probability_nats"), point.cell.get("context_tokens")
            if is_number(nats) and is_number(context):
                values.setdefault(float(context), []).append(float(nats))
        if values:
            means = [sum(values[x]) / len(values[x]) for x in sorted(values)]
            curves.append(Curve(series=series, x=sorted(values), y=means))
    if not curves:
        return None
    return Plot(
        name="needle_log_probability",
        title="Certainty of the right answer",
        caption="Mean log-probability in nats of the whole right answer, over all depths, against context "
        "length; 0 is certainty. It tells models apart that all answer wrongly.",
        x=CONTEXT_AXIS,
        y=Axis(label="log-probability of the answer (nats)"),
        curves=curves,
        trained_tokens=longest_trained(results),
    )


def needle_heat_maps(results: Results) -> HeatMaps | None:
    """Prepare one heat map per architecture that the needle was tried on; None where the points do not say
    their contexts and depths."""
    contexts = contexts_of(results, "needle")
    depths = sorted({float(p.cell["depth"]) for p in results.of("needle") if is_number(p.cell.get("depth"))})
    tried = {(point.arch, point.size) for point in results.of("needle")}
    if not contexts or not depths:
        return None
    return HeatMaps(
        name="needle_heat_maps",
        title="Needle accuracy by context and depth",
        caption="Exact-match accuracy in percent by context length (across) and depth of the needle "
        "(down, 0% is the start). A bar below a column marks a trained length; hatched cells failed "
        "as named.",
        maps=[
            _heat_map(results, series, contexts, depths) for series in results.series if series.key in tried
        ],
    )


def _heat_map(results: Results, series: Series, contexts: list[float], depths: list[float]) -> HeatMap:
    values: dict[Position, list[float]] = {}
    status: dict[Position, str] = {}
    for point in results.of("needle", series):
        accuracy = point.metrics.get("accuracy")
        for position in _positions(point.cell, contexts, depths):
            if point.status != "ok":
                status[position] = point.status
            elif is_number(accuracy):
                values.setdefault(position, []).append(float(accuracy))
    return HeatMap(
        series=series,
        contexts=contexts,
        depths=depths,
        trained=trained_contexts(results),
        accuracy={position: sum(found) / len(found) for position, found in values.items()},
        status=status,
    )


def _positions(cell: dict[str, object], contexts: list[float], depths: list[float]) -> list[Position]:
    """Return the cells of the heat map that a point covers: a whole row or column, or all of them, where its
    cell leaves out a coordinate."""
    context, depth = cell.get("context_tokens"), cell.get("depth")
    return [
        (x, y)
        for x in contexts
        for y in depths
        if (context is None or context == x) and (depth is None or depth == y)
    ]


def needle_table(results: Results) -> Table:
    """Return accuracy over all depths and the answer's log-probability at every context length."""
    contexts, trained = contexts_of(results, "needle"), trained_contexts(results)
    rows = []
    for series in results.series:
        points = results.of("needle", series)
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
    chance_text = "not recorded" if chance is None else f"{100 * chance:.3g}%"
    return Table(
        name="needle",
        caption="Exact match over all depths with its Wilson 95% interval, and the mean log-probability of "
        f"the answer in nats. {_num_examples_text(results)} examples per cell of the grid; chance is "
        f"{chance_text}.",
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(
                Column(title=integer(x), unit="tokens, trained" if x in trained else "tokens, beyond")
                for x in contexts
            ),
        ],
        rows=rows,
    )


def _num_examples_text(results: Results) -> str:
    """Return "20", or "20 to 40" where cells differ."""
    found = [p.metrics.get("num_examples") for p in results.ok("needle")]
    known = sorted({int(value) for value in found if is_number(value) and value > 0})
    if not known:
        return MISSING
    return " to ".join(dict.fromkeys(integer(value) for value in (known[0], known[-1])))
