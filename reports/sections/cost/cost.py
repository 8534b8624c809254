"""Time, memory, state and FLOPs against context, and where architectures cross the Transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reports.draw.numbers import MISSING, bytes_text, integer, significant
from reports.draw.plot import CONTEXT_AXIS, Axis, Curve, Plot
from reports.draw.table import Cell, Column, Table, failed_cell, name_cell
from reports.results.crossover import REFERENCE_ARCH, Crossover, Interval, crossovers, shared_contexts
from reports.results.load import Results
from reports.results.queries import cost_map, latency_table
from reports.results.series import Series
from reports.sections.base import Section, fold


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A quantity drawn against context and searched for crossovers.

    key: metric name in the records; phase: of the latency cells, None for the cost card."""

    name: str
    key: str
    phase: str | None
    title: str
    axis: str


COSTS = (
    Cost(name="prefill", key="median_ms", phase="prefill", title="Prefill time", axis="ms per prompt"),
    Cost(name="decode", key="median_ms", phase="decode", title="Decode time", axis="ms per token"),
    Cost(name="memory", key="peak_memory_bytes", phase="prefill", title="Peak memory", axis="bytes"),
    Cost(name="state", key="state_bytes", phase="decode", title="State, measured", axis="bytes"),
    Cost(name="predicted_state", key="state_bytes", phase=None, title="State, by formula", axis="bytes"),
    Cost(
        name="flops",
        key="decode_flops_per_token",
        phase=None,
        title="Decode FLOPs",
        axis="FLOPs per token",
    ),
)


@dataclass(frozen=True, kw_only=True)
class CostCurves:
    """One cost at one batch size: series key -> curve, and -> (p10, p90) where it is a time."""

    cost: Cost
    batch_size: float
    curves: dict[tuple[str, str], dict[float, float]]
    spreads: dict[tuple[str, str], dict[float, Interval]]

    def crossings(self, series: Series, all_series: list[Series]) -> list[Crossover]:
        """Return where a series crosses the reference architecture of its size."""
        reference = (REFERENCE_ARCH, series.size)
        if series.arch == REFERENCE_ARCH or reference not in {other.key for other in all_series}:
            return []
        return crossovers(
            self.curves.get(series.key, {}),
            self.curves.get(reference, {}),
            self.spreads.get(series.key),
            self.spreads.get(reference),
        )


def section(results: Results) -> Section:
    """Return the section; it says so where no cost was measured."""
    anchor, title = "cost", "Cost against context"
    all_curves = cost_curves(results)
    if not all_curves and not results.of("latency"):
        return Section(anchor=anchor, title=title, notes=["No cost was measured."])
    notes, tables = [], []
    batch_sizes = [entry.batch_size for entry in all_curves if entry.cost.phase]
    smallest = min(batch_sizes, default=1)
    drawn = [entry for entry in all_curves if entry.cost.phase is None or entry.batch_size == smallest]
    plots = (cost_plot(results, entry) for entry in drawn)
    if all_curves and not any(entry.cost.name == "memory" for entry in all_curves):
        notes.append("Peak memory was not recorded on this device.")
    if len(set(batch_sizes)) > 1:
        notes.append("Figures show the smallest batch; the tables hold the others.")
    crossings = crossover_table(results, all_curves)
    if crossings.rows:
        tables.append(crossings)
    else:
        notes.append("Crossovers need the Transformer and another architecture at shared contexts.")
    return Section(
        anchor=anchor,
        title=title,
        notes=notes,
        figures=[plot for plot in plots if plot],
        tables=tables,
        folded=fold("Every latency cell", latency_cells_table(results) if results.of("latency") else None),
    )


def cost_curves(results: Results) -> list[CostCurves]:
    """Return all costs at all batch sizes, without those that have no number."""
    latency = latency_table(results)
    found = []
    for cost in COSTS:
        if cost.phase is None:
            curves = {series.key: cost_map(results, series, cost.key) for series in results.series}
            found.append(CostCurves(cost=cost, batch_size=1, curves=curves, spreads={}))
            continue
        rows = latency[latency["phase"] == cost.phase].dropna(subset=[cost.key])
        for batch_size in sorted(rows["batch_size"].unique()):
            found.append(_measured(cost, float(batch_size), rows[rows["batch_size"] == batch_size]))
    return [entry for entry in found if any(entry.curves.values())]


def _measured(cost: Cost, batch_size: float, part: pd.DataFrame) -> CostCurves:
    curves: dict[tuple[str, str], dict[float, float]] = {}
    spreads: dict[tuple[str, str], dict[float, Interval]] = {}
    for row in part.sort_values("context_tokens").to_dict("records"):
        key, context = (row["arch"], row["size"]), float(row["context_tokens"])
        curves.setdefault(key, {})[context] = float(row[cost.key])
        if cost.key == "median_ms" and not math.isnan(row["p10_ms"]) and not math.isnan(row["p90_ms"]):
            spreads.setdefault(key, {})[context] = (float(row["p10_ms"]), float(row["p90_ms"]))
    return CostCurves(cost=cost, batch_size=batch_size, curves=curves, spreads=spreads)


def crossover_table(results: Results, all_curves: list[CostCurves]) -> Table:
    """Return where each architecture crosses the reference in each cost, or which side it stays on.

    There are no rows where the reference is not among the results."""
    columns = [Column(title="Architecture", is_numeric=False)]
    for entry in all_curves:
        unit = f"batch {integer(entry.batch_size)}" if entry.cost.phase else ""
        columns.append(Column(title=entry.cost.title, unit=unit, is_numeric=False))
    rows = []
    for series in results.series:
        cells = [_crossover_cell(entry, series, results.series) for entry in all_curves]
        if series.arch != REFERENCE_ARCH and any(cell.text != MISSING for cell in cells):
            rows.append([name_cell(series), *cells])
    return Table(
        name="crossovers",
        caption="Against the Transformer: the context in tokens from which an architecture costs less or "
        "more, interpolated between the two measured contexts named below it, as a straight line on log-log "
        "axes; nothing is extrapolated. “Always” is within the contexts measured for both, with the ratio at "
        "the last. “Within the spread”: at one of the two contexts the 10th to 90th percentiles of the times "
        "touch, so that the crossing may be noise.",
        columns=columns,
        rows=rows,
    )


def _crossover_cell(entry: CostCurves, series: Series, all_series: list[Series]) -> Cell:
    reference = entry.curves.get((REFERENCE_ARCH, series.size), {})
    curve = entry.curves.get(series.key, {})
    shared = shared_contexts(curve, reference)
    crossings = entry.crossings(series, all_series)
    if not shared:
        return failed_cell(None)
    if not crossings:
        above = {curve[x] > reference[x] for x in shared if curve[x] != reference[x]}
        if not above:
            return Cell(text="equal")
        word = "always more" if True in above else "always less"
        last = shared[-1]
        return Cell(text=word, note=f"{_ratio_text(curve[last] / reference[last])} at {integer(last)}")
    text = "; ".join(
        f"{'less' if crossing.is_below_after else 'more'} from {integer(crossing.context_tokens)}"
        for crossing in crossings
    )
    notes = [" to ".join(integer(x) for x in crossing.between_tokens) for crossing in crossings]
    if any(crossing.is_clear is False for crossing in crossings):
        notes.append("within the spread")
    return Cell(text=text, note=", ".join(notes))


def _ratio_text(ratio: float) -> str:
    return f"1/{integer(1 / ratio)}" if ratio < 0.1 else f"{significant(ratio)} ×"


def latency_cells_table(results: Results) -> Table:
    """Return every latency cell, failures in their place."""
    table = latency_table(results)
    labels = {series.key: series for series in results.series}
    rows = []
    order = ["phase", "batch_size", "context_tokens"]
    for row in table.sort_values(order, kind="stable").to_dict("records"):
        rows.append([*latency_start(row, labels[(row["arch"], row["size"])]), *_latency_numbers(row)])
    measured = {tuple(row[name] for name in ("arch", "size", *order)) for row in table.to_dict("records")}
    for point in results.failures():
        position = (point.arch, point.size, *(point.cell.get(name) for name in order))
        if point.task == "latency" and position not in measured:
            start = latency_start(point.cell, labels[(point.arch, point.size)])
            rows.append([*start, failed_cell(point.status), *[failed_cell(None)] * 5])
    return Table(
        name="latency",
        caption="Every latency cell. A prefill reads the whole context (time to first token), in several "
        "calls where it is longer than chunk_tokens; a decode step adds one token to a context of that "
        "length. The first call, with whatever is compiled or tuned in it, is timed apart and is not among "
        "the samples.",
        columns=[
            Column(title="Phase", is_numeric=False),
            Column(title="Context", unit="tokens"),
            Column(title="Batch"),
            Column(title="Architecture", is_numeric=False),
            Column(title="Median", unit="ms [p10, p90]"),
            Column(title="Throughput", unit="tokens/s"),
            Column(title="Peak memory"),
            Column(title="State"),
            Column(title="First call", unit="ms"),
            Column(title="Seeds"),
        ],
        rows=rows,
    )


def latency_start(cell: Mapping[Any, Any], series: Series) -> list[Cell]:
    """Return the first four cells of a row: phase, context, batch and architecture."""
    context, batch_size = (
        value if isinstance(value := cell.get(name), (int, float)) else None
        for name in ("context_tokens", "batch_size")
    )
    return [
        Cell(text=str(cell.get("phase", "all"))),
        Cell(text=integer(context)),
        Cell(text=integer(batch_size)),
        name_cell(series),
    ]


def _latency_numbers(row: Mapping[Any, Any]) -> list[Cell]:
    note = f"[{significant(row['p10_ms'])}, {significant(row['p90_ms'])}]"
    return [
        Cell(text=significant(row["median_ms"]), note=note),
        Cell(text=significant(row["tokens_per_s"])),
        Cell(text=bytes_text(row["peak_memory_bytes"])),
        Cell(text=bytes_text(row["state_bytes"])),
        Cell(text=significant(row["first_call_ms"])),
        Cell(text=integer(row["num_seeds"])),
    ]


def cost_plot(results: Results, entry: CostCurves) -> Plot | None:
    """Prepare one cost against context on log axes, its crossings with the Transformer circled.

    A zero, such as memory too little to show, has no place on such an axis and is left out; None where
    nothing is left."""
    curves = [
        Curve(series=series, x=list(drawn), y=list(drawn.values()))
        for series in results.series
        if (drawn := {x: y for x, y in sorted(entry.curves.get(series.key, {}).items()) if y > 0})
    ]
    if not curves:
        return None
    crossings = {series: entry.crossings(series, results.series) for series in results.series}
    num_crossings = sum(len(found) for found in crossings.values())
    batch = f", batch {integer(entry.batch_size)}" if entry.cost.phase else ""
    found = f"{num_crossings} crossover{'s' if num_crossings != 1 else ''} with the Transformer circled"
    return Plot(
        name=f"{entry.cost.name}_batch{entry.batch_size:g}" if entry.cost.phase else entry.cost.name,
        title=f"{entry.cost.title}{batch}",
        caption=f"{entry.cost.title} ({entry.cost.axis}{batch}) against context, both axes logarithmic; "
        f"lower is better; {found if num_crossings else 'no curve crosses the Transformer’s'}.",
        x=CONTEXT_AXIS,
        y=Axis(label=entry.cost.axis, scale="log"),
        curves=curves,
        circled=[
            Curve(series=series, x=[one.context_tokens for one in found], y=[one.value for one in found])
            for series, found in crossings.items()
            if found
        ],
        circle_label="crosses Transformer",
    )
