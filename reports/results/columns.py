"""The columns of the ranking: one entry per column, which the page, the terminal and the summary read.

An entry says how an architecture's value is read, at which cells, in which unit it is written and which
direction is better. A value is compared only between architectures that have it for the same cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from harness.record.metrics import Direction, Metric
from reports.results.load import Results
from reports.results.queries import (
    cells_of,
    cost_map,
    failure_of_phase,
    lookup,
    pool,
    status_of,
    trained_contexts,
)
from reports.results.series import Series


@dataclass(frozen=True, kw_only=True)
class Value:
    """An architecture's value in one column.

    value:     None where it is missing; status is why, where something failed.
    low, high: its 95% interval.
    sd:        the sample standard deviation between seeds.
    num_cells, num_cells_tried: of the cells that it covers, those with a number, and all.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    status: str | None = None
    num_cells: int = 1
    num_cells_tried: int = 1

    @property
    def admits_zero(self) -> bool:
        """Whether the value may be 0: its interval holds 0, or there is a value without an interval."""
        if self.value is None:
            return False
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    @property
    def comparable(self) -> float | None:
        """The value, unless it covers fewer cells than its rivals' do."""
        return self.value if self.num_cells == self.num_cells_tried else None


@dataclass(frozen=True, kw_only=True)
class ComparedCells:
    """The cells at which architectures are compared; None where there is none.

    context_tokens:       of the loss: the longest context that every architecture was given.
    phase_context_tokens: "prefill" and "decode" -> the longest context that every architecture with a
                          latency has.
    latency:              the latencies at batch_size.
    is_state_measured:    whether state_bytes are measured; else they are the cost card's.
    """

    context_tokens: float | None
    phase_context_tokens: dict[str, float | None]
    batch_size: float | None
    latency: pd.DataFrame
    state_context_tokens: float | None
    is_state_measured: bool


Read = Callable[[Results, ComparedCells, Series], Value]


@dataclass(frozen=True, kw_only=True)
class RankingColumn:
    """One column of the ranking.

    read:        the value of an architecture; None for what is known only when the rows are in order.
    unit:        as in harness.record.metrics.Metric, or "parameters".
    is_signed:   whether positive values carry their sign.
    small_print: what stands below the title on the page. {at} is "at 4,096 tokens", {batch} ", batch 4"
                 where it is not 1, {source} "measured" or "predicted".
    at:          the context at which the value is read.
    short:       the title in the terminal, where the column is left out without one.
    legend:      what the terminal says below the ranking; {tokens} is the context.
    superlative: the heading under which the summary names the best.
    summary_unit: what follows the best value there.
    """

    name: str
    title: str
    read: Read | None
    unit: str
    direction: Direction
    is_signed: bool = False
    small_print: str = ""
    at: Callable[[ComparedCells], float | None] = lambda cells: None
    short: str = ""
    legend: str = ""
    superlative: str = ""
    summary_unit: str = ""


def _num_parameters(results: Results, cells: ComparedCells, series: Series) -> Value:
    found = (lookup(results.table(task), series, "num_parameters") for task in ("train", "cost"))
    return Value(value=next((value for value in found if value), None))


def _bits_per_byte(results: Results, cells: ComparedCells, series: Series) -> Value:
    context = cells.context_tokens
    status = status_of(results, series, "perplexity", context)
    table = results.table("perplexity")
    if context is None or table.empty:
        return Value(status=status)
    value, low, high, sd = (
        lookup(table, series, f"bits_per_byte{end}", context_tokens=context)
        for end in ("", "_low", "_high", "_sd")
    )
    return Value(value=value, low=low, high=high, sd=sd, status=status)


def _needle(*, is_trained: bool) -> Read:
    def read(results: Results, cells: ComparedCells, series: Series) -> Value:
        trained = trained_contexts(results)
        pooled = pool(
            point
            for point in results.of("needle", series)
            if (point.cell.get("context_tokens") in trained) == is_trained
        )
        if pooled is None:
            return Value(status=status_of(results, series, "needle"))
        return Value(
            value=pooled.accuracy,
            low=pooled.low,
            high=pooled.high,
            num_cells=pooled.num_cells,
            num_cells_tried=pooled.num_cells_tried,
        )

    return read


def _median_ms(phase: str) -> Read:
    def read(results: Results, cells: ComparedCells, series: Series) -> Value:
        context = cells.phase_context_tokens[phase]
        value, sd = (
            lookup(cells.latency, series, name, phase=phase, context_tokens=context)
            for name in ("median_ms", "median_ms_sd")
        )
        return Value(value=value, sd=sd, status=failure_of_phase(results, series, phase, context))

    return read


def _state_bytes(results: Results, cells: ComparedCells, series: Series) -> Value:
    context = cells.state_context_tokens
    if not cells.is_state_measured:
        known = cost_map(results, series, "state_bytes")
        return Value(value=None if context is None else known.get(context))
    found = (
        lookup(cells.latency, series, "state_bytes", phase=phase, context_tokens=context)
        for phase, phase_context in cells.phase_context_tokens.items()
        if phase_context == context
    )
    return Value(value=next((value for value in found if value is not None), None))


def _trained_tokens_per_s(results: Results, cells: ComparedCells, series: Series) -> Value:
    table = results.table("train")
    value, sd = (lookup(table, series, name) for name in ("tokens_per_s", "tokens_per_s_sd"))
    return Value(value=value, sd=sd, status=status_of(results, series, "train"))


COLUMNS = (
    RankingColumn(
        name="num_parameters",
        title="Parameters",
        short="params",
        read=_num_parameters,
        unit="parameters",
        direction="neither",
    ),
    RankingColumn(
        name="bits_per_byte",
        title="Bits per byte",
        short="bits/byte",
        read=_bits_per_byte,
        unit="bits/byte",
        direction="lower",
        small_print="{at} [95%]",
        at=lambda cells: cells.context_tokens,
        legend="bits/byte at {tokens} tokens",
        superlative="Fewest bits per byte",
    ),
    RankingColumn(
        name="behind",
        title="Behind the first",
        read=None,
        unit="bits/byte",
        direction="neither",
        is_signed=True,
        small_print="bits per byte, paired [95%]",
    ),
    RankingColumn(
        name="needle_trained",
        title="Needle, trained lengths",
        short="needle",
        read=_needle(is_trained=True),
        unit="share",
        direction="higher",
        small_print="exact match [95%]",
        superlative="Needle, trained lengths",
    ),
    RankingColumn(
        name="needle_beyond",
        title="Needle, beyond",
        short="beyond",
        read=_needle(is_trained=False),
        unit="share",
        direction="higher",
        small_print="exact match [95%]",
        superlative="Needle, beyond",
    ),
    RankingColumn(
        name="prefill_ms",
        title="Prefill",
        short="prefill",
        read=_median_ms("prefill"),
        unit="ms",
        direction="lower",
        small_print="ms per prompt {at}{batch}",
        at=lambda cells: cells.phase_context_tokens["prefill"],
        legend="prefill: ms for {tokens} tokens",
        superlative="Fastest prefill",
        summary_unit=" ms",
    ),
    RankingColumn(
        name="decode_ms",
        title="Decode",
        short="decode",
        read=_median_ms("decode"),
        unit="ms",
        direction="lower",
        small_print="ms per token {at}{batch}",
        at=lambda cells: cells.phase_context_tokens["decode"],
        legend="decode: ms per token at {tokens}",
        superlative="Fastest decode",
        summary_unit=" ms per token",
    ),
    RankingColumn(
        name="state_bytes",
        title="State",
        short="state",
        read=_state_bytes,
        unit="bytes",
        direction="lower",
        small_print="{source} {at}",
        at=lambda cells: cells.state_context_tokens,
        superlative="Smallest state",
    ),
    RankingColumn(
        name="train_tokens_per_s",
        title="Training",
        read=_trained_tokens_per_s,
        unit="tokens/s",
        direction="higher",
        small_print="tokens/s",
    ),
)
#: Tasks whose quality the columns above show.
TASKS_WITH_COLUMNS = ("perplexity", "needle")


def declared_columns(results: Results) -> list[RankingColumn]:
    """Return a column for each other task with a headline quality that two architectures have."""
    tasks = dict.fromkeys(p.task for p in results.points if p.task not in TASKS_WITH_COLUMNS)
    columns = []
    for task in tasks:
        headline = next((metric for metric in results.metrics(task) if metric.is_headline), None)
        if headline is None or headline.kind != "quality":
            continue
        found = {(p.arch, p.size) for p in results.ok(task) if p.metrics.get(headline.name) is not None}
        if len(found) > 1:
            columns.append(_declared_column(task, headline))
    return columns


def _declared_column(task: str, headline: Metric) -> RankingColumn:
    def read(results: Results, cells: ComparedCells, series: Series) -> Value:
        own = [one for one in cells_of(results, task) if one.series == series]
        known = [value for one in own if (value := one.mean(headline.name)) is not None]
        if not known:
            return Value(status=status_of(results, series, task))
        num_cells = len({repr(one.cell) for one in cells_of(results, task)})
        return Value(value=sum(known) / len(known), num_cells=len(known), num_cells_tried=num_cells)

    return RankingColumn(
        name=f"{task}.{headline.name}",
        title=task.replace("_", " ").capitalize(),
        read=read,
        unit=headline.unit,
        direction=headline.direction,
        small_print=f"{headline.label}, mean over cells",
    )
