"""The first pass of an architecture that dispatches, beside the prefill that it is part of."""

from __future__ import annotations

from reports.draw.numbers import significant
from reports.draw.table import Cell, Column, Table, number_cell
from reports.results.load import Results
from reports.results.queries import latency_table
from reports.sections.base import Section
from reports.sections.cost.cost import latency_start


def section(results: Results) -> Section | None:
    """Return the section; None where no architecture dispatches."""
    table = dispatch_table(results)
    if table is None:
        return None
    note = (
        "A dispatching architecture first reads the whole prompt to choose its experts and then answers; "
        "its time to first token holds both passes. This is what the first one takes."
    )
    return Section(anchor="dispatch", title="Dispatch", notes=[note], tables=[table])


def dispatch_table(results: Results) -> Table | None:
    """Return dispatch beside the prefill that it is part of; None where no architecture dispatches."""
    table = latency_table(results)
    table = table[table["dispatch_ms"].notna()]
    if table.empty:
        return None
    labels = {series.key: series for series in results.series}
    rows = []
    for row in table.sort_values(["phase", "batch_size", "context_tokens"]).to_dict("records"):
        share = row["dispatch_ms"] / row["median_ms"] if row["median_ms"] else None
        rows.append(
            [
                *latency_start(row, labels[(row["arch"], row["size"])]),
                Cell(text=significant(row["dispatch_ms"])),
                Cell(text=significant(row["median_ms"])),
                number_cell(share, significant(share, 2)),
            ]
        )
    return Table(
        name="dispatch",
        caption="The first pass over the prompt, which fixes the expert mixture, timed apart.",
        columns=[
            Column(title="Phase", is_numeric=False),
            Column(title="Context", unit="tokens"),
            Column(title="Batch"),
            Column(title="Architecture", is_numeric=False),
            Column(title="Dispatch", unit="ms"),
            Column(title="The phase's median", unit="ms"),
            Column(title="Ratio", unit="dispatch / median"),
        ],
        rows=rows,
    )
