"""Numbers that all timing tasks have in common."""

from __future__ import annotations

from collections.abc import Sequence

from harness.measure.statistics import percentile
from harness.record.metrics import Metric

TIME_METRICS = (
    Metric(
        name="median_ms",
        label="median",
        unit="ms",
        direction="lower",
        kind="cost",
        low="p10_ms",
        high="p90_ms",
        is_headline=True,
    ),
    Metric(name="p10_ms", label="10th percentile", unit="ms", direction="neither", kind="cost"),
    Metric(name="p90_ms", label="90th percentile", unit="ms", direction="neither", kind="cost"),
    Metric(name="tokens_per_s", label="throughput", unit="tokens/s", direction="higher", kind="cost"),
    Metric(name="first_call_ms", label="first call", unit="ms", direction="lower", kind="cost"),
    Metric(name="peak_memory_bytes", label="peak memory", unit="bytes", direction="lower", kind="cost"),
)


def time_metrics(
    times_ms: Sequence[float],
    *,
    num_tokens: int,
    first_call_ms: float,
    peak_memory_bytes: int | None,
) -> dict[str, float | int | None]:
    """Return the numbers that TIME_METRICS declares, from the times of a call that processes num_tokens."""
    median_ms = percentile(times_ms, 0.5)
    return {
        "median_ms": median_ms,
        "p10_ms": percentile(times_ms, 0.1),
        "p90_ms": percentile(times_ms, 0.9),
        "tokens_per_s": 1e3 * num_tokens / median_ms,
        "first_call_ms": first_call_ms,
        "peak_memory_bytes": peak_memory_bytes,
    }
