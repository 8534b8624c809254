"""Pool the needle examples of several cells and seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from harness.measure.statistics import wilson_interval_over_seeds
from harness.record.schema import Point
from reports.results.load import is_number


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Needle examples of several cells taken together.

    accuracy, low, high:  exact-match share and its Wilson 95% interval over seeds.
    num_cells, num_cells_tried:  cells with a number, and cells that should have one.
    """

    accuracy: float
    low: float
    high: float
    num_examples: int
    num_cells: int
    num_cells_tried: int


def pool(points: Iterable[Point]) -> Pooled | None:
    """Return needle points taken together, failed ones counting as cells tried; None where none has a number.

    Seeds are pooled too, and further seeds do not narrow the interval."""
    points = list(points)
    usable = [
        p
        for p in points
        if p.status == "ok" and is_number(p.metrics.get("accuracy")) and p.metrics.get("num_examples")
    ]
    if not usable:
        return None
    num_correct, num_examples = Counter[int](), Counter[int]()
    for point in usable:
        count = int(point.metrics["num_examples"] or 0)
        num_examples[point.seed] += count
        num_correct[point.seed] += round(float(point.metrics["accuracy"] or 0) * count)
    low, high = wilson_interval_over_seeds(
        [num_correct[seed] for seed in num_examples], list(num_examples.values())
    )
    return Pooled(
        accuracy=num_correct.total() / num_examples.total(),
        low=low,
        high=high,
        num_examples=num_examples.total(),
        num_cells=len(usable),
        num_cells_tried=len(points),
    )
