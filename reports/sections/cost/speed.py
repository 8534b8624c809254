"""Decode steps beside the bandwidth bound: the time that memory traffic alone would take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reports.draw.numbers import integer, percent
from reports.draw.table import Cell, Column, Table, failed_cell, name_cell
from reports.results.load import Results, is_number
from reports.results.queries import CellPoints, cells_of
from reports.results.series import Series
from reports.sections.base import Section

#: Batch -> share of the bound that a decode step must reach.
TARGET_SHARES = {1: 0.50, 64: 0.60}
#: How far the longest time over contexts may be above the shortest, for architectures of constant state.
TARGET_SPREAD = 0.05


def section(results: Results) -> Section | None:
    """Return the section; None where no bound was recorded."""
    table = decode_table(results)
    if table is None:
        return None
    return Section(anchor="decode-bound", title="Decode against its bandwidth bound", tables=[table])


def decode_table(results: Results) -> Table | None:
    """Return the share of the bandwidth bound that decode steps reach, one row per architecture and batch.

    Beside it stand the targets, the spread over contexts, and whether steps came from CUDA graphs. None
    without a bound."""
    rows_of_cells: dict[tuple[float, Series], dict[float, CellPoints]] = {}
    for one in cells_of(results, "latency"):
        batch, context = one.cell.get("batch_size"), one.cell.get("context_tokens")
        if one.cell.get("phase") == "decode" and one.series and is_number(batch) and is_number(context):
            rows_of_cells.setdefault((batch, one.series), {})[context] = one
    rows_of_cells = {
        key: cells
        for key, cells in rows_of_cells.items()
        if any(one.mean("floor_ms") is not None for one in cells.values())
    }
    if not rows_of_cells:
        return None
    contexts = sorted({context for cells in rows_of_cells.values() for context in cells})
    order = {series.key: index for index, series in enumerate(results.series)}
    rows = [
        _row(series, batch, contexts, rows_of_cells[batch, series])
        for batch, series in sorted(rows_of_cells, key=lambda key: (key[0], order[key[1].key]))
    ]
    return Table(
        name="decode_bound",
        caption="The bound is the time of reading all weights and the state and of writing the state, at the "
        "speed of a large copy in that run; a share is the bound over the median time. Spread: how far the "
        "longest median over the contexts is above the shortest. Targets: "
        f"{' and '.join(f'{share:.0%} at batch {batch}' for batch, share in TARGET_SHARES.items())}; a "
        f"spread of at most {TARGET_SPREAD:.0%} where the measured state is constant.",
        columns=[
            Column(title="Architecture", is_numeric=False),
            Column(title="Batch"),
            *(Column(title=integer(context), unit="tokens") for context in contexts),
            Column(title="Target", unit="share of the bound", is_numeric=False),
            Column(title="Spread", unit="over contexts"),
            Column(title="Target", unit="spread", is_numeric=False),
            Column(title="CUDA graph", is_numeric=False),
        ],
        rows=rows,
    )


def _row(
    series: Series, batch: float, contexts: Sequence[float], cells: dict[float, CellPoints]
) -> list[Cell]:
    shares = {context: _share(one) for context, one in cells.items()}
    found = [shares.get(context) for context in contexts]
    spread, spread_target = _spread(list(cells.values()), len(contexts))
    return [
        name_cell(series),
        Cell(text=integer(batch)),
        *(
            failed_cell(cells[context].status if context in cells else None)
            if share is None
            else Cell(text=f"{share:.1%}")
            for context, share in zip(contexts, found, strict=True)
        ),
        Cell(text=_share_target(batch, contexts, found)),
        Cell(text=spread),
        Cell(text=spread_target),
        Cell(text=_uses_graph(cells.values())),
    ]


def _share(one: CellPoints) -> float | None:
    """Return the bound over the median; None where either is not known."""
    bound, median = one.mean("floor_ms"), one.mean("median_ms")
    return bound / median if bound is not None and median is not None else None


def _share_target(batch: float, contexts: Sequence[float], shares: Sequence[float | None]) -> str:
    """Return the target at this batch and where it is missed; "" where there is no target."""
    target = TARGET_SHARES.get(int(batch))
    if target is None:
        return ""
    missed = [
        integer(context)
        for context, share in zip(contexts, shares, strict=True)
        if share is not None and share < target
    ]
    if missed:
        return f"{percent(target)}: missed at {', '.join(missed)}"
    return f"{percent(target)}: {_reached(shares.count(None), len(shares))}"


def _reached(num_missing: int, num_contexts: int) -> str:
    if num_missing == num_contexts:
        return "not measured"
    return "reached where measured" if num_missing else "reached"


def _spread(cells: Sequence[CellPoints], num_contexts: int) -> tuple[str, str]:
    """Return the spread of the medians and whether it meets the target.

    The latter is "" where the state grows or is not known; both are "" with fewer than two contexts."""
    measured = [one for one in cells if one.mean("median_ms") is not None]
    medians = [median for one in measured if (median := one.mean("median_ms")) is not None]
    if len(medians) < 2:
        return "", ""
    spread = max(medians) / min(medians) - 1
    states = {one.mean("state_bytes") for one in measured}
    if len(states) > 1 or states == {None}:
        return f"{spread:.1%}", ""
    is_met = spread <= TARGET_SPREAD
    reached = _reached(num_contexts - len(medians), num_contexts) if is_met else "missed"
    return f"{spread:.1%}", f"{percent(TARGET_SPREAD)}: {reached}"


def _uses_graph(cells: Iterable[CellPoints]) -> str:
    used = {
        point.details.get("uses_decode_graph")
        for one in cells
        for point in one.points
        if point.status == "ok"
    }
    return "yes" if used == {True} else "no" if used == {False} else "some"
