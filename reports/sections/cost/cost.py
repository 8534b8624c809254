"""Tables about time, memory and state: crossovers, all latency cells, dispatch, learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from reports.draw.curves import Line, names_of, plot
from reports.draw.numbers import MISSING, bytes_text, integer, significant
from reports.draw.style import MUTED, Picture, context_axis, drawing, legend, log_axis, new_figure, save
from reports.draw.table import Cell, Column, Table, failed_cell, name_cell
from reports.results.crossover import REFERENCE_ARCH, Crossover, Interval, crossovers, shared_contexts
from reports.results.load import Results
from reports.results.queries import cost_map, latency_table
from reports.results.series import Series


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
    Cost(name="prefill", key="median_ms", phase="prefill", title="Prefill time", axis="ms a prompt"),
    Cost(name="decode", key="median_ms", phase="decode", title="Decode time", axis="ms a token"),
    Cost(name="memory", key="peak_memory_bytes", phase="prefill", title="Peak memory", axis="bytes"),
    Cost(name="state", key="state_bytes", phase="decode", title="State, measured", axis="bytes"),
    Cost(name="predicted_state", key="state_bytes", phase=None, title="State, by formula", axis="bytes"),
    Cost(name="flops", key="decode_flops_per_token", phase=None, title="Decode FLOPs", axis="FLOPs a token"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CostCurves:
    """One cost at one batch size: series key -> curve, and -> (p10, p90) where it is a time."""

    cost: Cost
    batch_size: float
    curves: dict[tuple[str, str], dict[float, float]]
    spreads: dict[tuple[str, str], dict[float, Interval]]

    def crossings(self, series: Series, all_series: list[Series]) -> list[Crossover]:
        """Crossings of a series with the reference architecture of its size."""
        reference = (REFERENCE_ARCH, series.size)
        if series.arch == REFERENCE_ARCH or reference not in {other.key for other in all_series}:
            return []
        return crossovers(
            self.curves.get(series.key, {}),
            self.curves.get(reference, {}),
            self.spreads.get(series.key),
            self.spreads.get(reference),
        )


def cost_curves(results: Results) -> list[CostCurves]:
    """All costs at all batch sizes, those without a single number left out."""
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
    """One row an architecture, one column a cost: where it crosses the reference, or which side it
    stays on. No rows where the reference is not among the results."""
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
    """Every latency cell, failures in their place."""
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


def cost_figure(results: Results, entry: CostCurves, output: Path) -> Picture | None:
    """One cost against context on log axes, crossovers with the Transformer circled. A zero, such as
    memory too little to show, has no place on such an axis and is left out."""
    lines = [
        Line(series=series, x=list(drawn), y=list(drawn.values()))
        for series in results.series
        if (drawn := {x: y for x, y in sorted(entry.curves.get(series.key, {}).items()) if y > 0})
    ]
    if not lines:
        return None
    crossings = {series.label: entry.crossings(series, results.series) for series in results.series}
    with drawing():
        figure, axes = new_figure()
        for line in lines:
            plot(axes, line)
        for series in results.series:
            for crossing in crossings[series.label]:
                axes.plot(
                    crossing.context_tokens,
                    crossing.value,
                    marker="o",
                    markersize=9,
                    markerfacecolor="none",
                    markeredgewidth=1.6,
                    markeredgecolor=series.colour,
                    zorder=5,
                )
        context_axis(axes, [x for line in lines for x in line.x])
        log_axis(axes, entry.cost.axis)
        circle = Line2D([], [], color=MUTED, marker="o", mfc="none", ms=8, ls="", label="crosses Transformer")
        num_crossings = sum(len(found) for found in crossings.values())
        legend(figure, [line.series for line in lines], [circle] if num_crossings else [])
        batch = f", batch {integer(entry.batch_size)}" if entry.cost.phase else ""
        found = f"{num_crossings} crossover{'s' if num_crossings != 1 else ''} with the Transformer circled"
        return save(
            figure,
            output,
            name=f"{entry.cost.name}_batch{entry.batch_size:g}" if entry.cost.phase else entry.cost.name,
            title=f"{entry.cost.title}{batch}",
            caption=f"{entry.cost.title} ({entry.cost.axis}{batch}) against context, both axes logarithmic; "
            f"lower is better; {found if num_crossings else 'no curve crosses the Transformer’s'}.",
            alternative_text=f"{entry.cost.title} against context in tokens, a line each for "
            f"{names_of(lines)}; {found}.",
        )
