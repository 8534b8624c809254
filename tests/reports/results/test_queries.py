"""Needle examples of several cells and seeds, taken together."""

from __future__ import annotations

from types import ModuleType

import pytest

from harness.measure.statistics import wilson_interval
from harness.record.schema import Point
from reports.results.queries import pool


def test_pooling_weighs_examples_and_counts_failed_cells(builder: ModuleType) -> None:
    points = [
        builder.point("a", "needle", {}, run_id="r", metrics={"accuracy": accuracy, "num_examples": count})
        for accuracy, count in ((1.0, 30), (0.0, 10))
    ]
    pooled = pool([*points, builder.failed(points[0], "oom", "no room")])
    assert pooled is not None
    assert (pooled.accuracy, pooled.num_examples, pooled.num_cells, pooled.num_cells_tried) == (
        0.75,
        40,
        2,
        3,
    )
    assert (pooled.low, pooled.high) == wilson_interval(30, 40)
    assert pool([builder.failed(points[0], "oom", "no room")]) is None


def test_five_equal_seeds_are_no_surer_than_one(builder: ModuleType) -> None:
    def points(num_seeds: int) -> list[Point]:
        metrics = {"accuracy": 0.35, "num_examples": 20}
        return [
            builder.point("a", "needle", {}, run_id="r", seed=seed, metrics=metrics)
            for seed in range(num_seeds)
        ]

    once, many = pool(points(1)), pool(points(5))
    assert once is not None and many is not None
    assert (many.accuracy, many.num_examples) == (pytest.approx(0.35), 100)
    assert (many.low, many.high) == pytest.approx((once.low, once.high))
