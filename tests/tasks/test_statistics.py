"""Intervals against published and exact values."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.statistics import bootstrap_ratio_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_agrees_with_published_values(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_not_empty_at_the_ends() -> None:
    low, high = wilson_interval(20, 20)
    assert high == 1.0 and low == pytest.approx(1 - wilson_interval(0, 20)[1])


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="num_successes="):
        wilson_interval(successes, trials)


def test_bootstrap_agrees_with_the_normal_interval_of_many_samples() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, size=400)
    low, high = bootstrap_ratio_interval(values, np.ones(400), seed=1)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_weighs_documents_by_their_bytes() -> None:
    assert bootstrap_ratio_interval([2.0, 20.0], [1.0, 10.0], seed=0) == pytest.approx((2.0, 2.0))


def test_bootstrap_is_seeded_and_says_nothing_of_one_document() -> None:
    numbers = [1.0, 2.0, 4.0]
    assert bootstrap_ratio_interval(numbers, [1] * 3, seed=3) == bootstrap_ratio_interval(
        numbers, [1] * 3, seed=3
    )
    assert bootstrap_ratio_interval([1.0], [1.0], seed=0) is None
