"""Loss against position and context."""

from __future__ import annotations

from pathlib import Path

from harness.record.schema import Point
from reports.draw.curves import Line, token_curves
from reports.draw.numbers import MISSING, fixed, integer, significant
from reports.draw.style import Picture
from reports.draw.table import Cell, Column, Table, interval_text, name_cell, number_cell, spread
from reports.results.load import Results, is_number
from reports.results.queries import contexts_of, lookup, status_of


def loss_by_context(results: Results, output: Path) -> Picture | None:
    """Bits per byte against context length."""
    frame = results.table("perplexity")
    if "bits_per_byte" not in frame:
        return None
    lines = []
    for series in results.series:
        own = frame[(frame["arch"] == series.arch) & (frame["size"] == series.size)]
        own = own.dropna(subset=["bits_per_byte"]).sort_values("context_tokens")
        if own.empty:
            continue
        ends = [
            own[name].tolist() if name in own and own[name].notna().all() else None
            for name in ("bits_per_byte_low", "bits_per_byte_high")
        ]
        values = (own["context_tokens"].tolist(), own["bits_per_byte"].tolist())
        lines.append(Line(series=series, x=values[0], y=values[1], low=ends[0], high=ends[1]))
    return token_curves(
        results,
        output,
        lines,
        name="bits_per_byte_by_context",
        title="Loss against context",
        y_label="bits per byte",
        caption="Bits per byte on test documents against the tokens of context (log axis); lower is better. "
        "Bands are 95% bootstrap intervals over documents.",
    )


def loss_by_position(results: Results, output: Path) -> Picture | None:
    """Mean loss by position bucket, at the longest context each architecture was measured at."""
    lines, contexts = [], set()
    for series in results.series:
        points = [p for p in results.samples(series, "perplexity") if p.samples.get("bucket_loss_nats")]
        longest = max((p.cell.get("context_tokens", 0) for p in points), default=0)
        curve = _bucket_means([p for p in points if p.cell.get("context_tokens", 0) == longest])
        if curve:
            contexts.add(longest)
            lines.append(Line(series=series, x=list(curve), y=list(curve.values())))
    at = " or ".join(integer(context) for context in sorted(contexts))
    return token_curves(
        results,
        output,
        lines,
        name="loss_by_position",
        title="Loss against position",
        y_label="nats a token",
        is_position=True,
        caption=f"Mean loss in nats a token by position bucket, drawn at its last position; documents read "
        f"with {at} tokens of context; lower is better. A curve that keeps falling uses what it read.",
    )


def _bucket_means(points: list[Point]) -> dict[float, float]:
    """Last position of each bucket -> mean over seeds; buckets without tokens are left out."""
    values: dict[float, list[float]] = {}
    for point in points:
        ends, losses = point.samples.get("bucket_end_tokens") or [], point.samples["bucket_loss_nats"]
        for end, loss in zip(ends, losses, strict=False):
            if is_number(end) and is_number(loss) and end > 0:
                values.setdefault(float(end), []).append(float(loss))
    return {end: sum(found) / len(found) for end, found in sorted(values.items())}


def perplexity_table(results: Results) -> Table:
    """Bits per byte, its interval and perplexity at every context length."""
    frame = results.table("perplexity")
    contexts = contexts_of(results, "perplexity")
    rows = []
    for series in results.series:
        cells = [name_cell(series)]
        for context in contexts:
            value, low, high, sd, perplexity = (
                lookup(frame, series, name, context_tokens=context)
                for name in (
                    "bits_per_byte",
                    "bits_per_byte_low",
                    "bits_per_byte_high",
                    "bits_per_byte_sd",
                    "perplexity",
                )
            )
            note = interval_text(low, high, 3) + spread(sd) + f" ppl {significant(perplexity)}"
            cells.append(
                number_cell(value, fixed(value, 3), status_of(results, series, "perplexity", context), note)
            )
        rows.append(cells)
    counts = _sample_counts(results)
    return Table(
        name="perplexity",
        caption="Bits per byte on test documents with that many tokens of context, the 95% bootstrap "
        f"interval over documents, and perplexity a token. {counts}".strip(),
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(Column(title=integer(context), unit="tokens of context") for context in contexts),
        ],
        rows=rows,
    )


def _sample_counts(results: Results) -> str:
    documents = [p.metrics.get("num_documents") for p in results.ok("perplexity")]
    tokens = [p.metrics.get("num_tokens") for p in results.ok("perplexity")]
    parts = []
    for values, word in ((documents, "documents"), (tokens, "tokens")):
        known = sorted({int(value) for value in values if is_number(value)})
        if known:
            ends = dict.fromkeys(integer(value) for value in (known[0], known[-1]))
            parts.append(f"{' to '.join(ends)} {word}")
    return f"Each cell: {', '.join(parts)}." if parts else ""


def domains_table(results: Results) -> Table | None:
    """Bits per byte by domain at the longest context; None where no point has domains."""
    contexts = contexts_of(results, "perplexity")
    found: dict[tuple[str, str], tuple[dict[str, float], str]] = {}
    for point in results.ok("perplexity"):
        domains = point.details.get("domains")
        if contexts and point.cell.get("context_tokens") == contexts[-1] and isinstance(domains, dict):
            adaptation = point.details.get("adaptation")
            found[(point.arch, point.size)] = (domains, adaptation if isinstance(adaptation, str) else "")
    names = list(dict.fromkeys(name for domains, _ in found.values() for name in domains))
    if not names:
        return None
    rows = []
    for series in results.series:
        if series.key not in found:
            continue
        domains, adaptation = found[series.key]
        values = [domains.get(name) for name in names]
        cells = [Cell(text=fixed(value, 3) if is_number(value) else MISSING) for value in values]
        rows.append([name_cell(series), *cells, Cell(text=adaptation)])
    return Table(
        name="domains",
        caption=f"Bits per byte by domain at {integer(contexts[-1])} tokens of context (the last seed read).",
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(Column(title=name) for name in names),
            Column(title="Adaptation", is_numeric=False),
        ],
        rows=rows,
    )
