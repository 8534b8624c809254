"""The ranking as a table."""

from __future__ import annotations

from reports.draw.numbers import MISSING, bytes_text, fixed, integer, scaled, significant
from reports.draw.table import (
    Cell,
    Column,
    Table,
    interval_text,
    mark_best,
    name_cell,
    number_cell,
    pooled_cell,
    spread,
)
from reports.results.load import Results
from reports.results.ranking import Ranking, Row, make_ranking
from reports.results.statistics import Pooled
from reports.sections.base import Section


def section(results: Results) -> Section | None:
    """Return the section; None where no architecture was measured."""
    if not results.series:
        return None
    table = ranking_table(make_ranking(results))
    return Section(anchor="ranking", title="Ranking", tables=[table], footnotes=ranking_notes(results))


def ranking_table(ranking: Ranking) -> Table:
    """See `reports.results.ranking`; the best value of each column is marked."""
    contexts = ranking.phase_context_tokens
    batch = f", batch {integer(ranking.batch_size)}" if ranking.batch_size and ranking.batch_size > 1 else ""
    has_differences = any(row.behind for row in ranking.rows)
    columns = [
        Column(title="#"),
        Column(title="Architecture", is_numeric=False),
        Column(title="Parameters"),
        Column(title="Bits per byte", unit=f"{_at(ranking.context_tokens)} [95%]"),
        *([Column(title="Behind the first", unit="bits per byte, paired [95%]")] if has_differences else []),
        Column(title="Needle, trained lengths", unit="exact match [95%]"),
        Column(title="Needle, beyond", unit="exact match [95%]"),
        Column(title="Prefill", unit=f"ms a prompt {_at(contexts['prefill'])}{batch}"),
        Column(title="Decode", unit=f"ms a token {_at(contexts['decode'])}{batch}"),
        Column(
            title="State",
            unit=f"{'measured' if ranking.is_state_measured else 'predicted'} "
            f"{_at(ranking.state_context_tokens)}",
        ),
        Column(title="Training", unit="tokens/s"),
    ]
    table = Table(
        name="ranking",
        caption="One row an architecture, ordered by bits per byte at the longest context; "
        "bold is the best of its column.",
        columns=columns,
        rows=[_ranking_cells(index, row, has_differences) for index, row in enumerate(ranking.rows, start=1)],
    )
    keys: list[tuple[int, list[float | None], bool]] = [
        (3, [row.numbers["bits_per_byte"] for row in ranking.rows], False),
        (-6, [_comparable(row.needle_trained) for row in ranking.rows], True),
        (-5, [_comparable(row.needle_beyond) for row in ranking.rows], True),
        (-4, [row.numbers["prefill_ms"] for row in ranking.rows], False),
        (-3, [row.numbers["decode_ms"] for row in ranking.rows], False),
        (-2, [row.numbers["state_bytes"] for row in ranking.rows], False),
        (-1, [row.numbers["train_tokens_per_s"] for row in ranking.rows], True),
    ]
    for position, values, is_higher_better in keys:
        mark_best([row[position] for row in table.rows], values, is_higher_better)
    return table


def _ranking_cells(index: int, row: Row, has_differences: bool) -> list[Cell]:
    numbers, failures = row.numbers, row.failures
    bits = numbers["bits_per_byte"]
    note = interval_text(numbers["bits_per_byte_low"], numbers["bits_per_byte_high"], 3)
    cells = [
        Cell(text=str(index) if bits is not None else MISSING),
        name_cell(row.series),
        number_cell(numbers["num_parameters"], scaled(numbers["num_parameters"])),
        number_cell(
            bits, fixed(bits, 3), failures.get("bits_per_byte"), note + spread(numbers["bits_per_byte_sd"])
        ),
    ]
    if has_differences:
        difference = row.behind
        note = interval_text(difference[1], difference[2], 3) if difference else ""
        cells.append(Cell(text=f"{difference[0]:+.3f}" if difference else MISSING, note=note))
    cells += [
        pooled_cell(pooled, failures.get("needle")) for pooled in (row.needle_trained, row.needle_beyond)
    ]
    for phase in ("prefill", "decode"):
        value = numbers[f"{phase}_ms"]
        cells.append(
            number_cell(
                value,
                significant(value),
                failures.get(f"{phase}_ms"),
                spread(numbers[f"{phase}_ms_sd"]).strip(),
            )
        )
    speed = numbers["train_tokens_per_s"]
    return [
        *cells,
        number_cell(numbers["state_bytes"], bytes_text(numbers["state_bytes"])),
        number_cell(speed, integer(speed), failures.get("train_tokens_per_s")),
    ]


def _at(context_tokens: float | None) -> str:
    return "" if context_tokens is None else f"at {integer(context_tokens)} tokens"


def _comparable(pooled: Pooled | None) -> float | None:
    """An accuracy over fewer cells than its rivals' is no candidate for the best."""
    return None if pooled is None or pooled.num_cells < pooled.num_cells_tried else pooled.accuracy


def ranking_notes(results: Results) -> list[str]:
    notes = [
        "Order: bits per byte at the longest context that every architecture was given, lowest first; those "
        "without a number there come last. No other column affects it.",
        "Intervals: bits per byte by a 95% bootstrap over documents, needle by Wilson’s 95% over examples. "
        "“Behind the first” compares the two models document by document, which is sharper than "
        "comparing their intervals: where its interval holds 0, these documents do not tell them apart.",
        "Prefill and decode are medians at the longest context that every architecture has a time for, so "
        "that a row is comparable with its neighbours; other contexts are under “Cost against context”.",
    ]
    if len({point.seed for point in results.points}) > 1:
        notes.append(
            "Several seeds: numbers are means over seeds and ± is the sample standard deviation between "
            "them. Interval ends of bits per byte are means too. Needle examples of all seeds are pooled; in "
            "their intervals and in those of differences, the seed is the unit of replication."
        )
    return notes
