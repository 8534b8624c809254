"""Take our counterparts of published figures from records.

A `Measure` gives a counterpart in words, for a claim; a `ColumnMeasure` gives a column of values, for a
published table. Both give None where the records do not hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from reports.results.crossover import REFERENCE_ARCH, Curve, crossovers, shared_contexts
from reports.results.load import Results, is_number

#: Results and a size -> what was measured, in words, or None.
Measure = Callable[[Results, str], str | None]


class OurColumn(NamedTuple):
    """A column of a table.

    title:  what was measured, and where.
    values: by architecture; one that is missing was not measured.
    """

    title: str
    values: dict[str, str]


#: Results, a size and the table's architectures -> our column at that size, or None.
ColumnMeasure = Callable[[Results, str, Sequence[str]], OurColumn | None]


def curve(results: Results, size: str, arch: str, task: str, metric: str, **cell: Any) -> dict[float, float]:
    """Return a metric by context_tokens: its mean over the points there whose cell agrees with `cell`."""
    values: dict[float, list[float]] = {}
    for point in results.ok(task):
        if (point.arch, point.size) != (arch, size) or any(point.cell.get(k) != v for k, v in cell.items()):
            continue
        value = point.metrics.get(metric)
        if is_number(value):
            values.setdefault(float(point.cell["context_tokens"]), []).append(float(value))
    return {context: sum(some) / len(some) for context, some in sorted(values.items())}


def ahead_of_the_transformer(arch: str, paper_batch: int | None = None) -> Measure:
    """Say from which context on a prefill takes less time than the Transformer's, per batch size.

    paper_batch: the claim's batch size; where it was not measured, the text says so."""

    def measure(results: Results, size: str) -> str | None:
        shown = {}
        for batch in _batches(results, size):
            cell = {"phase": "prefill", "batch_size": batch}
            ours, reference = (
                curve(results, size, name, "latency", "median_ms", **cell) for name in (arch, REFERENCE_ARCH)
            )
            if shared_contexts(ours, reference):
                shown[batch] = f"{_ahead(ours, reference)} (batch {batch})"
        if shown and paper_batch is not None and paper_batch not in shown:
            shown[paper_batch] = f"batch {paper_batch} not measured"
        return "; ".join(shown[batch] for batch in sorted(shown)) or None

    return measure


def _batches(results: Results, size: str) -> list[int]:
    return sorted({p.cell["batch_size"] for p in results.ok("latency") if p.size == size})


def _ahead(ours: Curve, reference: Curve) -> str:
    shared = shared_contexts(ours, reference)
    longest = shared[-1]
    ratio = f"{reference[longest] / ours[longest]:.2f} times as fast at {longest:,.0f} tokens"
    crossings = [c for c in crossovers(ours, reference) if c.is_below_after]
    if ours[longest] >= reference[longest]:
        return f"not ahead, {ratio}"
    if not crossings:
        return f"ahead from the shortest measured, {shared[0]:,.0f} tokens, {ratio}"
    return f"ahead from about {crossings[-1].context_tokens:,.0f} tokens, {ratio}"


def speed_ratio(arch: str, other: str, phase: str) -> Measure:
    """Say how many times as fast as `other` it is, at the longest context and the largest batch of both."""

    def measure(results: Results, size: str) -> str | None:
        for batch in reversed(_batches(results, size)):
            cell = {"phase": phase, "batch_size": batch}
            ours, theirs = (
                curve(results, size, name, "latency", "tokens_per_s", **cell) for name in (arch, other)
            )
            shared = shared_contexts(ours, theirs)
            if shared:
                ratio = ours[shared[-1]] / theirs[shared[-1]]
                return f"{ratio:.2f} times, {phase} at {shared[-1]:,.0f} tokens, batch {batch}"
        return None

    return measure


def bits_at_the_longest(archs: Sequence[str]) -> Measure:
    """List bits per byte of several architectures at the longest context that all of them have."""

    def measure(results: Results, size: str) -> str | None:
        column = bits_column(results, size, archs)
        if column is None or len(column.values) < 2:
            return None
        shown = ", ".join(f"{arch} {value}" for arch, value in column.values.items())
        return f"{shown} {column.title}"

    return measure


def bits_column(results: Results, size: str, archs: Sequence[str]) -> OurColumn | None:
    """Return bits per byte at the longest context that all measured architectures have."""
    curves = {arch: curve(results, size, arch, "perplexity", "bits_per_byte") for arch in archs}
    measured = {arch: values for arch, values in curves.items() if values}
    shared = set.intersection(*(set(values) for values in measured.values())) if measured else set()
    if not shared:
        return None
    longest = max(shared)
    values = {arch: f"{values[longest]:.3f}" for arch, values in measured.items()}
    return OurColumn(f"bits per byte at {longest:,.0f} tokens", values)


def needle_column(results: Results, size: str, archs: Sequence[str]) -> OurColumn | None:
    """Return the percentage of needles found at every length, mean over depths; – where none is."""
    curves = {arch: curve(results, size, arch, "needle", "accuracy") for arch in archs}
    contexts = sorted({context for values in curves.values() for context in values})
    if not contexts:
        return None
    values = {
        arch: " / ".join(f"{100 * found[c]:.0f}" if c in found else "–" for c in contexts)
        for arch, found in curves.items()
        if found
    }
    return OurColumn(f"our needle, %, at {' / '.join(f'{c:,.0f}' for c in contexts)} tokens", values)


def gain_beyond(archs: Sequence[str], context_tokens: int) -> Measure:
    """Say by how much the loss changes from `context_tokens` of context to the longest."""

    def measure(results: Results, size: str) -> str | None:
        shown = []
        for arch in archs:
            values = curve(results, size, arch, "perplexity", "bits_per_byte")
            if values and context_tokens in values and max(values) > context_tokens:
                longest = max(values)
                change = values[longest] - values[context_tokens]
                shown.append(f"{arch} {change:+.3f} bits per byte to {longest:,.0f}")
        return ", ".join(shown) or None

    return measure


def longest_read(arch: str) -> Measure:
    """Say how long the longest context is that was read to its end."""

    def measure(results: Results, size: str) -> str | None:
        lengths = [
            p.cell["context_tokens"]
            for task in ("latency", "perplexity", "needle")
            for p in results.ok(task)
            if (p.arch, p.size) == (arch, size) and p.details.get("is_prefilled", True)
        ]
        return f"{max(lengths):,} tokens" if lengths else None

    return measure


def adaptation_gains(results: Results, size: str) -> str | None:
    """List the share of right greedy answers on held-out prompts of each domain: base → expert (LoRA)."""
    found: dict[str, dict[str, list[float]]] = {}
    for point in results.ok("adaptation"):
        value = point.metrics.get("accuracy")
        if point.size == size and is_number(value):
            by_name = found.setdefault(point.cell["domain"], {})
            by_name.setdefault(point.cell["adaptation"], []).append(100 * value)
    shown = []
    for domain, by_name in found.items():
        if {"base", "expert", "lora"} <= set(by_name):
            base, expert, lora = (
                sum(by_name[name]) / len(by_name[name]) for name in ("base", "expert", "lora")
            )
            shown.append(f"{domain} {base:.1f} → {expert:.1f}% ({lora:.1f}%)")
    return ", ".join(shown) or None


def dispatch_share(results: Results, size: str) -> str | None:
    """List the first pass's time as a share of the second's, at the smallest batch."""
    batch, shares = next(iter(_batches(results, size)), None), []
    for point in results.ok("latency"):
        first, total = point.metrics.get("dispatch_ms"), point.metrics.get("median_ms")
        is_ours = (point.size, point.cell["batch_size"]) == (size, batch)
        if is_ours and is_number(first) and is_number(total) and total > first:
            shares.append((point.cell["context_tokens"], first / (total - first)))
    if not shares:
        return None
    return ", ".join(f"{100 * share:.0f}% at {context:,} tokens" for context, share in sorted(shares))
