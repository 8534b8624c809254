"""The learning-rate search."""

from __future__ import annotations

from reports.draw.numbers import fixed, rate_text
from reports.draw.plot import Axis, Curve, Plot
from reports.draw.table import Column, Table, name_cell, number_cell
from reports.results.load import Results, is_number
from reports.results.queries import lookup, rows_of
from reports.sections.base import Section, fold


def section(results: Results) -> Section | None:
    """Return the section; None where no rate was searched."""
    if not results.of("learning_rate_search"):
        return None
    plot = learning_rate_plot(results)
    return Section(
        anchor="learning-rate-search",
        title="Learning-rate search",
        figures=[plot] if plot else [],
        folded=fold("Every rate", learning_rate_table(results)),
    )


def learning_rate_plot(results: Results) -> Plot | None:
    """Prepare the held-out loss of the runs of the search against the learning rate; None without a loss."""
    frame = results.table("learning_rate_search")
    if "mixture_loss_nats" not in frame:
        return None
    curves = []
    for series in results.series:
        own = rows_of(frame, series).dropna(subset=["mixture_loss_nats"]).sort_values("learning_rate")
        if len(own):
            x, y = own["learning_rate"].tolist(), own["mixture_loss_nats"].tolist()
            curves.append(Curve(series=series, x=x, y=y))
    if not curves:
        return None
    return Plot(
        name="learning_rate_search",
        title="Learning-rate search",
        caption="Loss on held-out batches of the mixture that was trained on, text and needle contexts "
        "with their weights, after training at each learning rate (log axis).",
        x=Axis(label="learning rate", scale="log"),
        y=Axis(label="held-out loss (nats, as weighted)"),
        curves=curves,
    )


def learning_rate_table(results: Results) -> Table | None:
    """Return the held-out loss at each searched rate, the lowest marked; None where no rate was searched."""
    points = results.of("learning_rate_search")
    rates = sorted({float(p.cell["learning_rate"]) for p in points if is_number(p.cell.get("learning_rate"))})
    if not rates:
        return None
    frame, train = results.table("learning_rate_search"), results.table("train")
    failed = {(p.arch, p.size, p.cell.get("learning_rate")): p.status for p in points if p.status != "ok"}
    rows = []
    for series in results.series:
        values = [lookup(frame, series, "mixture_loss_nats", learning_rate=rate) for rate in rates]
        statuses = [failed.get((*series.key, rate)) for rate in rates]
        if not any(values) and not any(statuses):
            continue
        cells = [
            number_cell(value, fixed(value, 3), status)
            for value, status in zip(values, statuses, strict=True)
        ]
        known = [value for value in values if value is not None]
        for cell, value in zip(cells, values, strict=True):
            cell.is_best = value is not None and value == min(known)
        used = lookup(train, series, "learning_rate")
        rows.append([name_cell(series), *cells, number_cell(used, rate_text(used))])
    return Table(
        name="learning_rates",
        caption="Loss on held-out batches of the mixture that is trained on (text and needle contexts, with "
        "their weights) after training at each rate of the common grid; bold is each architecture's "
        "lowest. The last column is the rate that the training above used.",
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(Column(title=rate_text(rate), unit="learning rate") for rate in rates),
            Column(title="Used"),
        ],
        rows=rows,
    )
