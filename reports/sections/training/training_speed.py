"""Training steps: their time, and their share of the matrix-product bound."""

from __future__ import annotations

from reports.draw.numbers import bytes_text, integer, percent, significant
from reports.draw.table import Cell, Column, Table, name_cell, number_cell
from reports.results.load import Results
from reports.results.queries import cells_of
from reports.sections.base import Section


def section(results: Results) -> Section | None:
    """Return the section; None where no training step was timed."""
    table = training_speed_table(results)
    if table is None:
        return None
    return Section(anchor="training-speed", title="Training speed", tables=[table])


def training_speed_table(results: Results) -> Table | None:
    """Return time, throughput, utilisation and memory of training steps; None where none was timed."""
    rows = []
    for one in cells_of(results, "training_speed"):
        assert one.series is not None, "training steps are timed on a model"
        median, low, high = (one.mean(name) for name in ("median_ms", "p10_ms", "p90_ms"))
        note = "" if low is None or high is None else f"[{significant(low)}, {significant(high)}]"
        rows.append(
            [
                Cell(text=integer(one.cell.get("context_tokens"))),
                Cell(text=integer(one.cell.get("batch_size"))),
                name_cell(one.series),
                number_cell(median, significant(median), one.status, note),
                Cell(text=integer(one.mean("tokens_per_s"))),
                Cell(text=percent(one.mean("utilisation"))),
                Cell(text=bytes_text(one.mean("peak_memory_bytes"))),
                Cell(text=significant(one.mean("first_call_ms"))),
            ]
        )
    if not rows:
        return None
    return Table(
        name="training_speed",
        caption="Loss and gradients of a batch, without an optimiser. Utilisation: three times the products "
        "and attention of the forward pass, as a share of the rate of a large matrix product in that run. "
        "The first step, with whatever is compiled or tuned in it, is not among the samples.",
        columns=[
            Column(title="Context", unit="tokens"),
            Column(title="Batch"),
            Column(title="Architecture", is_numeric=False),
            Column(title="Step", unit="ms [p10, p90]"),
            Column(title="Throughput", unit="tokens/s"),
            Column(title="Utilisation", unit="of the matrix product"),
            Column(title="Peak memory"),
            Column(title="First step", unit="ms"),
        ],
        rows=rows,
    )
