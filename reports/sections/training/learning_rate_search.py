"""The learning-rate search."""

from __future__ import annotations

from pathlib import Path

from reports.draw.curves import Line, distinct, names_of, plot
from reports.draw.numbers import fixed, rate_text
from reports.draw.style import Picture, drawing, legend, log_axis, new_figure, save
from reports.draw.table import Column, Table, name_cell, number_cell
from reports.results.load import Results, is_number
from reports.results.queries import lookup


def learning_rate_figure(results: Results, output: Path) -> Picture | None:
    """Held-out loss of the runs of the search against the learning rate."""
    frame = results.table("learning_rate_search")
    if "mixture_loss_nats" not in frame:
        return None
    lines = []
    for series in results.series:
        own = frame[(frame["arch"] == series.arch) & (frame["size"] == series.size)]
        own = own.dropna(subset=["mixture_loss_nats"]).sort_values("learning_rate")
        if len(own):
            lines.append(
                Line(series=series, x=own["learning_rate"].tolist(), y=own["mixture_loss_nats"].tolist())
            )
    with drawing():
        figure, axes = new_figure()
        for line in lines:
            plot(axes, line)
        log_axis(axes, "learning rate", "x")
        axes.set_ylabel("held-out loss (nats, as weighted)")
        legend(figure, distinct(lines))
        return save(
            figure,
            output,
            name="learning_rate_search",
            title="Learning-rate search",
            caption="Loss on held-out batches of the mixture that was trained on, text and needle contexts "
            "with their weights, after training at each learning rate (log axis).",
            alternative_text=f"Held-out loss against learning rate, a line each for {names_of(lines)}.",
        )


def learning_rate_table(results: Results) -> Table | None:
    """Held-out loss at each searched rate, the picked one marked; None without a search."""
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
