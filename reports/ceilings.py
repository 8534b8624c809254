"""Times against what the machine could reach: decode beside its bandwidth floor, training beside the ceiling
of matrix products. Tables in Markdown, for the page of `reports.claims`."""

from __future__ import annotations

from harness.record import Point
from reports.load import Results, is_number


def decode_lines(results: Results) -> list[str]:
    """The share of the floor that a decode step reaches, a row an architecture, size and batch; how far
    times are apart over the contexts; and whether steps came from CUDA graphs. Empty without a floor."""
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
        "share is floor over median. Spread: the longest median over the shortest, less one.",
        "",
        _row("size", "architecture", "batch", *(f"{context:,}" for context in contexts), "spread", "graph"),
        _row(*["---"] * (len(contexts) + 5)),
    ]
    for (size, arch, batch), points in groups.items():
        ok = [p for p in points.values() if p.status == "ok"]
        medians = [p.metrics["median_ms"] for p in ok]
        spread = f"{max(medians) / min(medians) - 1:.0%}" if len(medians) > 1 else ""  # type: ignore[operator, type-var]
        graphs = {p.details.get("uses_decode_graph") for p in ok}
        used = "yes" if graphs == {True} else "no" if graphs == {False} else "some"
        shares = [_share(points.get(context)) for context in contexts]
        lines.append(_row(size, arch, str(batch), *shares, spread, used))
    return [*lines, ""]


def _share(point: Point | None) -> str:
    if point is None:
        return "not measured"
    if point.status != "ok":
        return point.status
    floor, median = point.metrics.get("floor_ms"), point.metrics.get("median_ms")
    return f"{floor / median:.0%}" if is_number(floor) and is_number(median) else "not measured"


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
