"""Times against what the machine could reach: decode beside its bandwidth floor, training beside the ceiling
of matrix products. Tables in Markdown, for the page of `reports.claims`."""

from __future__ import annotations

from collections.abc import Sequence

from harness.record.schema import Point
from reports.results.load import Results, is_number

#: What is asked of decode: the share of the floor by batch, and how far the longest time of an architecture
#: whose state is constant may be above its shortest, over the contexts.
ASKED_SHARES = {1: 0.50, 64: 0.60}
ASKED_SPREAD = 0.05


def decode_lines(results: Results) -> list[str]:
    """The share of the floor that a decode step reaches, a row an architecture, size and batch, beside what
    is asked; how far times are apart over the contexts, which is asked to be little where the state is
    constant; and whether steps came from CUDA graphs. Empty without a floor."""
    groups: dict[tuple[str, str, int], dict[int, Point]] = {}
    for point in results.of("latency"):
        if point.cell.get("phase") == "decode":
            key = (point.size, point.arch, point.cell["batch_size"])
            groups.setdefault(key, {})[point.cell["context_tokens"]] = point
    groups = {
        key: points
        for key, points in sorted(groups.items())
        if any(is_number(point.metrics.get("floor_ms")) for point in points.values())
    }
    if not groups:
        return []
    contexts = sorted({context for points in groups.values() for context in points})
    lines = [
        "## Decode against the bandwidth floor",
        "",
        "The floor: all weights, the state read and the state written, at what a copy moved in that run. A "
        "share is floor over median. Spread: the longest median over the shortest, less one. Asked: "
        f"{' and '.join(f'{share:.0%} at batch {batch}' for batch, share in ASKED_SHARES.items())}; a spread "
        f"of at most {ASKED_SPREAD:.0%} where the state is constant, as measured.",
        "",
        _row(
            *("size", "architecture", "batch", *(f"{context:,}" for context in contexts)),
            *("asked", "spread", "asked", "graph"),
        ),
        _row(*["---"] * (len(contexts) + 7)),
    ]
    for (size, arch, batch), points in groups.items():
        measured = [points.get(context) for context in contexts]
        ok = [p for p in points.values() if p.status == "ok"]
        graphs = {p.details.get("uses_decode_graph") for p in ok}
        used = "yes" if graphs == {True} else "no" if graphs == {False} else "some"
        shares = [_share(point) for point in measured]
        shown = [
            f"{share:.1%}" if share is not None else _why_not(point)
            for share, point in zip(shares, measured, strict=True)
        ]
        asked = _asked_share(batch, contexts, shares)
        lines.append(_row(size, arch, str(batch), *shown, asked, *_spread(ok, len(contexts)), used))
    return [*lines, ""]


def _share(point: Point | None) -> float | None:
    """Floor over median, None where one is not known."""
    if point is None or point.status != "ok":
        return None
    floor, median = point.metrics.get("floor_ms"), point.metrics.get("median_ms")
    return floor / median if is_number(floor) and is_number(median) else None


def _why_not(point: Point | None) -> str:
    return "not measured" if point is None or point.status == "ok" else point.status


def _asked_share(batch: int, contexts: Sequence[int], shares: Sequence[float | None]) -> str:
    """What is asked at this batch, and where it is missed; empty where nothing is asked."""
    asked = ASKED_SHARES.get(batch)
    if asked is None:
        return ""
    missed = [
        f"{context:,}"
        for context, share in zip(contexts, shares, strict=True)
        if share is not None and share < asked
    ]
    if missed:
        return f"{asked:.0%}: missed at {', '.join(missed)}"
    return f"{asked:.0%}: {_reached(shares.count(None), len(shares))}"


def _reached(num_missing: int, num_asked: int) -> str:
    if num_missing == num_asked:
        return "not measured"
    return "reached where measured" if num_missing else "reached"


def _spread(ok: Sequence[Point], num_contexts: int) -> tuple[str, str]:
    """How far medians are apart, and whether that is as little as is asked of a constant state; the latter
    is empty where the state grows or is not known, both where one context says neither."""
    medians = [median for p in ok if is_number(median := p.metrics.get("median_ms"))]
    if len(medians) < 2:
        return "", ""
    spread = max(medians) / min(medians) - 1
    states = {p.metrics.get("state_bytes") for p in ok}
    if len(states) > 1 or states == {None}:
        return f"{spread:.1%}", ""
    is_flat = spread <= ASKED_SPREAD
    reached = _reached(num_contexts - len(medians), num_contexts) if is_flat else "missed"
    return f"{spread:.1%}", f"{ASKED_SPREAD:.0%}: {reached}"


def training_lines(results: Results) -> list[str]:
    """Tokens a second, utilisation and memory of training steps. Empty where none was measured."""
    points = results.of("training_speed")
    if not points:
        return []
    lines = [
        "## Training speed",
        "",
        "Loss and gradients, without an optimiser. Utilisation: three times the forward pass's products and "
        "attention, over the rate of a large matrix product in that run.",
        "",
        _row("size", "architecture", "tokens", "batch", "tokens/s", "utilisation", "peak memory"),
        _row(*["---"] * 7),
    ]
    for point in sorted(points, key=lambda p: (p.size, p.cell["context_tokens"], p.arch)):
        cell = (f"{point.cell['context_tokens']:,}", str(point.cell["batch_size"]))
        rate, share, memory = (
            point.metrics.get(name) for name in ("tokens_per_s", "utilisation", "peak_memory_bytes")
        )
        values = (
            f"{rate:,.0f}" if is_number(rate) else point.status,
            f"{share:.0%}" if is_number(share) else "",
            f"{memory / 2**30:.1f} GiB" if is_number(memory) else "",
        )
        lines.append(_row(point.size, point.arch, *cell, *values))
    return [*lines, ""]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
