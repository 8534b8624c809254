"""The ranking as a few lines of text, for the end of a run in a terminal."""

from __future__ import annotations

from pathlib import Path

from reports.draw.numbers import (
    MISSING,
    SHORT_STATUS_WORDS,
    bytes_text,
    fixed,
    integer,
    percent,
    scaled,
    significant,
)
from reports.results.load import load
from reports.results.ranking import Row, make_ranking
from reports.results.statistics import Pooled

WIDTH = 100


def ranking_text(folder: Path) -> str:
    """A ranking of at most 100 columns, in the report's order. Raises ReportError as `load` does."""
    results = load([folder])
    ranking = make_ranking(results)
    heads = [
        "#",
        "architecture",
        "params",
        "bits/byte",
        "needle",
        "beyond",
        "prefill",
        "decode",
        "state",
    ]
    lines = [_cells(row) for row in ranking.rows]
    for number, (line, row) in enumerate(zip(lines, ranking.rows, strict=True), start=1):
        line.insert(0, str(number) if row.numbers["bits_per_byte"] is not None else MISSING)
    room = WIDTH - sum(2 + max(map(len, column)) for column in zip(heads, *lines, strict=True)) + 2
    room += max(len(line[1]) for line in [heads, *lines])  # what the names may take
    for line in lines:
        line[1] = line[1] if len(line[1]) <= room else line[1][: room - 1] + "…"
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    text = []
    for line in [heads, ["-" * width for width in widths], *lines]:
        padded = [
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(padded).rstrip())
    contexts = ranking.phase_context_tokens
    units = [
        ("bits/byte at {} tokens", ranking.context_tokens),
        ("prefill: ms for {} tokens", contexts["prefill"]),
        ("decode: ms a token at {}", contexts["decode"]),
    ]
    known = [unit.format(integer(context)) for unit, context in units if context is not None]
    text += ["; ".join(known) + "."] if known else []
    failures = results.failures()
    if failures:
        cells = "cells" if len(failures) > 1 else "cell"
        text.append(
            f"{len(failures)} {cells} gave no number; the report says why. retry_failed=true tries again."
        )
    if results.damaged_lines:
        text.append(f"Damaged record lines: {len(results.damaged_lines)}; the report names them.")
    return "\n".join(line[:WIDTH] for line in text)


def _cells(row: Row) -> list[str]:
    numbers, failures = row.numbers, row.failures

    def value(name: str, text: str) -> str:
        return text if numbers[name] is not None else _word(failures.get(name))

    def needle(pooled: Pooled | None) -> str:
        return percent(pooled.accuracy) if pooled else _word(failures.get("needle"))

    return [
        row.series.label,
        scaled(numbers["num_parameters"]),
        value("bits_per_byte", fixed(numbers["bits_per_byte"], 3)),
        needle(row.needle_trained),
        needle(row.needle_beyond),
        value("prefill_ms", significant(numbers["prefill_ms"])),
        value("decode_ms", significant(numbers["decode_ms"])),
        bytes_text(numbers["state_bytes"]),
    ]


def _word(status: str | None) -> str:
    return SHORT_STATUS_WORDS[status] if status else MISSING
