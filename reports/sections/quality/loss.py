"""The loss on test documents: against context, against position, by domain."""

from __future__ import annotations

from harness.record.schema import Point
from reports.draw.numbers import MISSING, fixed, integer, significant
from reports.draw.plot import CONTEXT_AXIS, POSITION_AXIS, Axis, Curve, Plot
from reports.draw.table import Cell, Column, Table, interval_text, name_cell, number_cell, spread
from reports.results.load import Results, is_number
from reports.results.queries import contexts_of, longest_trained, lookup, rows_of, status_of
from reports.sections.base import Section, fold

#: Said wherever the loss of an architecture with experts stands beside the others'.
HINT = (
    "Perplexity and bits per byte of an architecture with experts use the expert of the document’s true "
    "domain, a hint that no other architecture gets."
)


def section(results: Results) -> Section:
    """Return the section; it says so where no perplexity was measured."""
    anchor, title = "loss", "Loss against position and context"
    if not results.of("perplexity"):
        return Section(anchor=anchor, title=title, notes=["No perplexity was measured."])
    has_hint = any(point.details.get("adaptation") for point in results.ok("perplexity"))
    figures = (loss_by_context(results), loss_by_position(results))
    return Section(
        anchor=anchor,
        title=title,
        notes=[HINT] if has_hint else [],
        figures=[figure for figure in figures if figure],
        folded=[
            *fold("Every number", perplexity_table(results)),
            *fold("By domain", domains_table(results)),
        ],
    )


def loss_by_context(results: Results) -> Plot | None:
    """Prepare bits per byte against context length; None where there is none."""
    frame = results.table("perplexity")
    if "bits_per_byte" not in frame:
        return None
    curves = []
    for series in results.series:
        own = rows_of(frame, series).dropna(subset=["bits_per_byte"]).sort_values("context_tokens")
        if own.empty:
            continue
        low, high = (
            own[name].tolist() if name in own and own[name].notna().all() else None
            for name in ("bits_per_byte_low", "bits_per_byte_high")
        )
        x, y = own["context_tokens"].tolist(), own["bits_per_byte"].tolist()
        curves.append(Curve(series=series, x=x, y=y, low=low, high=high))
    if not curves:
        return None
    return Plot(
        name="bits_per_byte_by_context",
        title="Loss against context",
        caption="Bits per byte on test documents against the tokens of context (log axis); lower is better. "
        "Bands are 95% bootstrap intervals over documents.",
        x=CONTEXT_AXIS,
        y=Axis(label="bits per byte"),
        curves=curves,
        trained_tokens=longest_trained(results),
    )


def loss_by_position(results: Results) -> Plot | None:
    """Prepare the mean loss by position bucket, at the longest context of each architecture; None where no
    buckets were recorded."""
    curves, contexts = [], set()
    for series in results.series:
        points = [p for p in results.samples(series, "perplexity") if p.samples.get("bucket_loss_nats")]
        longest = max((p.cell.get("context_tokens", 0) for p in points), default=0)
        means = _bucket_means([p for p in points if p.cell.get("context_tokens", 0) == longest])
        if means:
            contexts.add(longest)
            curves.append(Curve(series=series, x=list(means), y=list(means.values())))
    if not curves:
        return None
    at = " or ".join(integer(context) for context in sorted(contexts))
    return Plot(
        name="loss_by_position",
        title="Loss against position",
        caption="Mean loss in nats per token by position bucket, drawn at the bucket’s last position; "
        f"documents read with {at} tokens of context; lower is better. A curve that keeps falling uses what "
        "it read.",
        x=POSITION_AXIS,
        y=Axis(label="nats per token"),
        curves=curves,
        trained_tokens=longest_trained(results),
    )


def _bucket_means(points: list[Point]) -> dict[float, float]:
    """Return the last position of each bucket -> its mean over seeds, without buckets that hold no token."""
    values: dict[float, list[float]] = {}
    for point in points:
        ends, losses = point.samples.get("bucket_end_tokens") or [], point.samples["bucket_loss_nats"]
        for end, loss in zip(ends, losses, strict=False):
            if is_number(end) and is_number(loss) and end > 0:
                values.setdefault(float(end), []).append(float(loss))
    return {end: sum(found) / len(found) for end, found in sorted(values.items())}


def perplexity_table(results: Results) -> Table:
    """Return bits per byte with its interval, and perplexity, at every context length."""
    frame = results.table("perplexity")
    contexts = contexts_of(results, "perplexity")
    names = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "bits_per_byte_sd", "perplexity")
    rows = []
    for series in results.series:
        cells = [name_cell(series)]
        for context in contexts:
            value, low, high, sd, perplexity = (
                lookup(frame, series, name, context_tokens=context) for name in names
            )
            note = interval_text(low, high, 3) + spread(sd) + f" ppl {significant(perplexity)}"
            status = status_of(results, series, "perplexity", context)
            cells.append(number_cell(value, fixed(value, 3), status, note))
        rows.append(cells)
    return Table(
        name="perplexity",
        caption="Bits per byte on test documents with that many tokens of context, the 95% bootstrap "
        f"interval over documents, and perplexity per token. {_sample_counts(results)}".strip(),
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(Column(title=integer(context), unit="tokens of context") for context in contexts),
        ],
        rows=rows,
    )


def _sample_counts(results: Results) -> str:
    parts = []
    for name, word in (("num_documents", "documents"), ("num_tokens", "tokens")):
        values = [point.metrics.get(name) for point in results.ok("perplexity")]
        known = sorted({int(value) for value in values if is_number(value)})
        if known:
            ends = dict.fromkeys(integer(value) for value in (known[0], known[-1]))
            parts.append(f"{' to '.join(ends)} {word}")
    return f"Each cell: {', '.join(parts)}." if parts else ""


def domains_table(results: Results) -> Table | None:
    """Return bits per byte by domain at the longest context; None where no point has domains."""
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
