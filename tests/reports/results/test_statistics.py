"""The statistics that a report computes itself."""

from __future__ import annotations

import math
from types import ModuleType

import pytest

from reports.results.statistics import paired_difference, paired_mean_difference, pool, wilson


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for correct, examples, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(correct, examples) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_examples=0"):
        wilson(0, 0)


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
    assert (pooled.low, pooled.high) == wilson(30, 40)
    assert pool([builder.failed(points[0], "oom", "no room")]) is None


def test_pairing_sees_a_difference_that_documents_hide() -> None:
    sizes = [1000.0] * 50
    other = [100.0 + 500.0 * (index % 7) for index in range(50)]
    nats = [value + 10.0 + (index % 3) for index, value in enumerate(other)]
    estimate, low, high = paired_difference(nats, other, sizes)
    expected = sum(10.0 + index % 3 for index in range(50)) / 50 / 1000 / math.log(2)
    assert estimate == pytest.approx(expected)
    assert 0 < low < estimate < high < 1.1 * expected
    assert paired_difference(nats, other, sizes) == (estimate, low, high)


def test_pairing_needs_the_same_documents() -> None:
    with pytest.raises(ValueError, match="unequal documents"):
        paired_difference([1.0], [1.0, 2.0], [1.0, 1.0])


def test_a_paired_difference_of_means_is_sharper_than_two_intervals() -> None:
    others = [float(value % 10) for value in range(200)]
    values = [value + 0.1 + 0.01 * (index % 3) for index, value in enumerate(others)]
    gain, low, high = paired_mean_difference(values, others)
    assert gain == pytest.approx(0.11, abs=1e-3) and 0.1 < low < gain < high < 0.12
    assert paired_mean_difference(others, values)[0] == pytest.approx(-gain)
    assert paired_mean_difference([1.0], [0.5]) == (0.5, 0.5, 0.5)
    for wrong in ([1.0, 2.0], []):
        with pytest.raises(ValueError, match="unequal examples"):
            paired_mean_difference(wrong, [1.0] if wrong else [])
