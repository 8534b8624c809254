"""The few statistics a report computes itself: pooling needle examples, paired document bootstrap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.record.schema import Point
from reports.results.load import is_number


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Needle examples of several cells taken together.

    accuracy, low, high:  exact-match share and its Wilson 95% interval.
    num_cells, num_cells_tried:  cells with a number, and cells that should have one.
    """

    accuracy: float
    low: float
    high: float
    num_examples: int
    num_cells: int
    num_cells_tried: int


def wilson(num_correct: float, num_examples: int) -> tuple[float, float]:
    """The Wilson score interval at 95% of a binomial proportion (Wilson 1927)."""
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples} must be positive")
    z = 1.959963984540054
    share = num_correct / num_examples
    scale = 1 + z * z / num_examples
    centre = (share + z * z / (2 * num_examples)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_examples + (z / (2 * num_examples)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def pool(points: Iterable[Point]) -> Pooled | None:
    """Pools needle points, failed ones counting as cells tried; None where none has a number.
    Seeds are pooled too: the interval is over examples, not over seeds."""
    points = list(points)
    usable = [
        p
        for p in points
        if p.status == "ok" and is_number(p.metrics.get("accuracy")) and p.metrics.get("num_examples")
    ]
    if not usable:
        return None
    num_examples = sum(int(p.metrics["num_examples"] or 0) for p in usable)
    num_correct = sum(float(p.metrics["accuracy"] or 0) * int(p.metrics["num_examples"] or 0) for p in usable)
    low, high = wilson(num_correct, num_examples)
    return Pooled(
        accuracy=num_correct / num_examples,
        low=low,
        high=high,
        num_examples=num_examples,
        num_cells=len(usable),
        num_cells_tried=len(points),
    )


def paired_difference(
    nats: Sequence[float], other_nats: Sequence[float], num_bytes: Sequence[float], num_resamples: int = 1000
) -> tuple[float, float, float]:
    """The difference in bits per byte of two models on the same documents, and its 95% bootstrap
    interval over documents (percentiles; the same fixed resampling seed every time).

    Pairing matters: documents differ far more than models do, so two overlapping intervals can
    hide a difference that holds on nearly every document. Raises ValueError unless the three
    sequences have one entry a document."""
    if not len(nats) == len(other_nats) == len(num_bytes) or not num_bytes:
        raise ValueError(f"unequal documents: {len(nats)}, {len(other_nats)}, {len(num_bytes)}")
    gaps = np.asarray(nats, dtype=float) - np.asarray(other_nats, dtype=float)
    sizes = np.asarray(num_bytes, dtype=float) * math.log(2)
    generator = np.random.default_rng(0)
    picked = generator.integers(len(sizes), size=(num_resamples, len(sizes)))
    estimates = gaps[picked].sum(axis=1) / sizes[picked].sum(axis=1)
    low, high = np.percentile(estimates, (2.5, 97.5))
    return float(gaps.sum() / sizes.sum()), float(low), float(high)


def paired_mean_difference(
    values: Sequence[float], other_values: Sequence[float], num_resamples: int = 1000
) -> tuple[float, float, float]:
    """mean(values - other_values) over examples that both were measured on, and its 95% bootstrap
    interval over examples (percentiles; the same fixed resampling seed every time). Raises ValueError
    unless the two have one entry an example."""
    if len(values) != len(other_values) or not len(values):
        raise ValueError(f"unequal examples: {len(values)}, {len(other_values)}")
    gaps = np.asarray(values, dtype=float) - np.asarray(other_values, dtype=float)
    picked = np.random.default_rng(0).integers(len(gaps), size=(num_resamples, len(gaps)))
    low, high = np.percentile(gaps[picked].mean(axis=1), (2.5, 97.5))
    return float(gaps.mean()), float(low), float(high)
