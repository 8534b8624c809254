"""Percentiles, intervals and tests, against hand values, published values, scipy, and simulation."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from harness.measure.statistics import (
    Comparison,
    Estimate,
    dunnett,
    holm,
    mann_whitney,
    percentile,
    ratio_interval,
    two_level_ratio,
    welch,
    wilson_interval,
    wilson_interval_over_seeds,
)


def width(ends: tuple[float, float] | Estimate | None) -> float:
    assert ends is not None
    low, high = ends[-2:]
    assert low is not None and high is not None
    return high - low


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.1, 1.3), (0.25, 1.75)]
)
def test_percentiles_interpolate(fraction: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], fraction) == pytest.approx(expected)
    assert percentile([7.0], fraction) == 7.0


def test_importing_it_imports_neither_torch_nor_what_takes_long() -> None:
    code = "import sys, harness.measure.statistics; print({'torch', 'scipy.stats'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


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
def test_wilson_agrees_with_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (3, 7), (20, 20), (500, 999)])
def test_wilson_agrees_with_scipy(successes: int, trials: int) -> None:
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_ends_exactly_at_none_and_all() -> None:
    assert wilson_interval(0, 20)[0] == 0.0 and wilson_interval(20, 20)[1] == 1.0


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"num_successes={successes} .* num_trials={trials}"):
        wilson_interval(successes, trials)
    with pytest.raises(ValueError, match=f"num_successes={successes} .* num_trials={trials}"):
        wilson_interval_over_seeds([1, successes], [2, trials])


@pytest.mark.parametrize("successes", [0, 7, 20])
def test_five_equal_seeds_say_as_much_of_a_proportion_as_one(successes: int) -> None:
    assert wilson_interval_over_seeds([successes] * 5, [20] * 5) == pytest.approx(
        wilson_interval(successes, 20)
    )


def test_seeds_that_differ_widen_the_interval_of_a_proportion() -> None:
    low, high = wilson_interval_over_seeds([200, 0, 200], [200, 200, 200])
    assert low < 0.1 and high > 0.9
    # By hand, two seeds of 10 and 30 in 100: the trials' variance is 0.2 * 0.8 / 100 = 0.0016, that of the
    # seeds 0.02 - 0.0016 over 2, times (12.7062 / 1.9600)**2; so 0.16 / 0.3883 = 0.4121 trials.
    z2 = 1.959964**2 / 0.4121
    expected = (0.2 + z2 / 2 + math.sqrt(z2 * 0.16 + z2**2 / 4)) / (1 + z2)
    assert wilson_interval_over_seeds([10, 30], [100, 100])[1] == pytest.approx(expected, abs=1e-4)


def test_bca_agrees_with_the_normal_interval_of_many_samples() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, size=400)
    half = 1.96 * values.std() / 20
    assert ratio_interval(values.tolist(), [1.0] * 400) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.02
    )


def test_bca_weighs_documents_by_their_bytes_and_is_seeded() -> None:
    assert ratio_interval([2.0, 20.0], [1.0, 10.0]) == pytest.approx((2.0, 2.0))
    values, ones = [1.0, 2.0, 4.0, 9.0, 3.0], [1.0] * 5
    assert ratio_interval(values, ones, seed=3) == ratio_interval(values, ones, seed=3)
    assert ratio_interval(values, ones, seed=3) != ratio_interval(values, ones, seed=4)


def test_bca_follows_a_skew() -> None:
    values = np.random.default_rng(0).exponential(size=30)
    interval = ratio_interval(values.tolist(), [1.0] * 30)
    assert interval is not None
    assert interval[1] - values.mean() > 1.1 * (values.mean() - interval[0])


def test_bca_of_too_little() -> None:
    assert ratio_interval([1.0], [1.0]) is None
    assert ratio_interval([], []) is None
    assert ratio_interval([3.0, 3.0, 3.0], [1.0, 1.0, 1.0]) == (3.0, 3.0)
    with pytest.raises(ValueError, match="2 numerators do not pair with 3 denominators"):
        ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0])


def test_five_equal_seeds_say_as_much_as_one() -> None:
    rng = np.random.default_rng(0)
    nats, sizes = rng.normal(2.0, 1.0, size=16).tolist(), rng.uniform(1.0, 3.0, size=16).tolist()
    once = two_level_ratio([nats], [sizes])
    many = two_level_ratio([nats] * 5, [sizes] * 5)
    assert once.value == pytest.approx(sum(nats) / sum(sizes)) and many.value == pytest.approx(once.value)
    assert (many.low, many.high) == pytest.approx((once.low, once.high))
    assert width(once) > 0.2


def test_one_document_has_no_interval() -> None:
    assert two_level_ratio([[3.0]], [[2.0]]) == (1.5, None, None)
    assert two_level_ratio([[3.0], [5.0]], [[2.0], [2.0]]) == (2.0, None, None)
    assert Estimate(1.5, None, None).admits(0)


def test_an_estimate_admits_what_its_interval_holds() -> None:
    estimate = Estimate(1.0, 0.5, 1.5)
    assert estimate.admits(0.5) and estimate.admits(1.5) and not estimate.admits(0) and not estimate.admits(2)


def test_seeds_may_have_unequal_documents() -> None:
    estimate = two_level_ratio([[1.0, 2.0, 3.0], [2.0]], [[1.0, 1.0, 1.0], [1.0]])
    assert estimate.value == 2.0 and width(estimate) > 0


@pytest.mark.parametrize(
    ("numerators", "denominators"), [([], []), ([[]], [[]]), ([[1.0]], [[1.0, 2.0]]), ([[1.0]], [])]
)
def test_documents_must_pair(numerators: list[list[float]], denominators: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="do not pair"):
        two_level_ratio(numerators, denominators)


def share_covered(
    interval: Callable[[NDArray[np.float64]], tuple[float, float]],
    draw: Callable[[np.random.Generator], NDArray[np.float64]],
    truth: float,
    num_repetitions: int = 200,
) -> float:
    """Return how often the interval of data that are drawn anew holds the truth."""
    rng = np.random.default_rng(0)
    ends = (interval(draw(rng)) for _ in range(num_repetitions))
    return sum(low <= truth <= high for low, high in ends) / num_repetitions


@pytest.mark.parametrize(
    ("num_seeds", "of_seeds", "of_documents", "of_both"),
    [(1, 0, 1, 0), (2, 1, 0.3, 0), (3, 1, 1, 0), (5, 1, 0.3, 0), (5, 0.1, 1, 0.3), (3, 0, 0, 1)],
)
def test_two_levels_cover_the_truth(
    num_seeds: int, of_seeds: float, of_documents: float, of_both: float
) -> None:
    # Standard deviations of what a seed, a document, and the two together add.
    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        return (
            rng.normal(0, of_seeds, size=(num_seeds, 1))
            + rng.normal(0, of_documents, size=(1, 20))
            + rng.normal(0, of_both, size=(num_seeds, 20))
        )

    def interval(values: NDArray[np.float64]) -> tuple[float, float]:
        low, high = two_level_ratio(values.tolist(), np.ones_like(values).tolist())[1:]
        assert low is not None and high is not None
        return low, high

    assert share_covered(interval, draw, 0.0) >= 0.91


@pytest.mark.parametrize(("share", "concentration"), [(0.1, 10.0), (0.1, 100.0), (0.5, 2.0), (0.5, 100.0)])
def test_proportions_of_seeds_cover_the_truth(share: float, concentration: float) -> None:
    # Each seed has a proportion of its own, of a beta distribution.
    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        own = rng.beta(share * concentration, (1 - share) * concentration, size=4)
        return rng.binomial(50, own).astype(float)

    def interval(counts: NDArray[np.float64]) -> tuple[float, float]:
        return wilson_interval_over_seeds(counts.astype(int).tolist(), [50] * 4)

    assert share_covered(interval, draw, share) >= 0.91


def test_mann_whitney_by_hand() -> None:
    # All 25 differences of these two; U = 25, of which 2 of the 252 arrangements are as far from the middle.
    found = mann_whitney([11.0, 12.0, 13.0, 14.0, 15.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.difference == 10.0
    assert found.p_value == pytest.approx(2 / 252)
    # 25 / 2 - 1.96 sqrt(25 * 11 / 12) = 3.1: the third of the sorted differences 6, 7, 7, 8 ... 13, 13, 14.
    assert (found.low, found.high) == (7.0, 13.0)


def test_too_few_samples_reject_no_shift() -> None:
    found = mann_whitney([2.0, 3.0, 4.0], [0.0, 0.1, 0.2])
    assert (found.low, found.high) == (-math.inf, math.inf) and found.p_value == pytest.approx(0.1)
    assert mann_whitney([2.0], [1.0]) == (1.0, -math.inf, math.inf, 1.0)


def test_welch_by_hand() -> None:
    # Means 2 and 6, variances 1 and 4 of three each: t = -4 / sqrt(5 / 3) with 50 / 17 degrees of freedom.
    found = welch([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    freedom, error = (5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2), math.sqrt(5 / 3)
    assert freedom == pytest.approx(50 / 17)
    assert found.difference == -4.0
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(4 / error, freedom))
    half = scipy.stats.t.ppf(0.975, freedom) * error
    assert (found.low, found.high) == pytest.approx((-4 - half, -4 + half))


def test_dunnett_agrees_with_the_published_example() -> None:
    # Dunnett (1955), Journal of the American Statistical Association 50: blood counts of animals.
    control = [7.40, 8.50, 7.20, 8.24, 9.84, 8.32]
    drugs = {"A": [9.76, 8.80, 7.68, 9.36], "B": [12.80, 9.68, 12.16, 9.20, 10.55]}
    found = dunnett(drugs, control)
    assert found["A"].difference == pytest.approx(0.65)
    assert found["B"].difference == pytest.approx(2.63, abs=5e-3)
    assert found["A"].low < 0 < found["A"].high and found["A"].p_value > 0.05
    assert found["B"].low > 0 and found["B"].p_value < 0.05
    assert dunnett(drugs, control) == found
    # Between that of one t-test with the variance of all three groups, and its double.
    variance = sum(np.var(group) * len(group) for group in (control, *drugs.values())) / 12
    single = 2 * scipy.stats.t.sf(found["B"].difference / math.sqrt(variance * (1 / 5 + 1 / 6)), 12)
    assert single < found["B"].p_value < 2 * single


def test_holm_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(found) == ["a", "b", "c", "d"]
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize("test", [mann_whitney, welch])
def test_equal_samples_do_not_differ(test: Callable[..., Comparison]) -> None:
    assert test([3.0] * 5, [3.0] * 5) == (0.0, 0.0, 0.0, 1.0)
    varied = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = test(varied, varied)
    assert found.difference == 0.0 and found.p_value == pytest.approx(1.0)
    assert found.low == -found.high < 0


def test_samples_that_do_not_vary_are_certain() -> None:
    assert welch([3.0, 3.0], [2.0, 2.0]) == (1.0, 1.0, 1.0, 0.0)
    assert dunnett({"a": [3.0, 3.0], "b": [2.0, 2.0]}, [2.0, 2.0]) == {
        "a": (1.0, 1.0, 1.0, 0.0),
        "b": (0.0, 0.0, 0.0, 1.0),
    }


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: mann_whitney([], [1.0]), r"at least 1 samples for this test, not \[0, 1\]"),
        (lambda: welch([1.0], [1.0, 2.0]), r"at least 2 samples for this test, not \[1, 2\]"),
        (lambda: dunnett({"a": [1.0]}, [1.0, 2.0]), r"at least 2 samples for this test, not \[2, 1\]"),
        (lambda: dunnett({}, [1.0, 2.0]), "something to compare"),
    ],
)
def test_tests_refuse_too_few_samples(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def false_findings(p_value: Callable[[np.random.Generator], float], num_repetitions: int) -> int:
    """Return how often a test finds a difference between samples of one distribution."""
    rng = np.random.default_rng(0)
    return sum(p_value(rng) < 0.05 for _ in range(num_repetitions))


def test_tests_keep_their_error_rate() -> None:
    def of_times(rng: np.random.Generator) -> float:
        return mann_whitney(rng.lognormal(size=20).tolist(), rng.lognormal(size=20).tolist()).p_value

    def of_means(rng: np.random.Generator) -> float:
        return welch(rng.normal(0, 1, size=5).tolist(), rng.normal(0, 3, size=5).tolist()).p_value

    def of_several_means(rng: np.random.Generator) -> float:
        others = {name: rng.normal(size=5).tolist() for name in "abc"}
        return min(found.p_value for found in dunnett(others, rng.normal(size=5).tolist()).values())

    def corrected(rng: np.random.Generator) -> float:
        pairs = {name: welch(rng.normal(size=5).tolist(), rng.normal(size=5).tolist()) for name in "abc"}
        return min(holm({name: found.p_value for name, found in pairs.items()}).values())

    # At the level, 5 in 100; more than 22 of 200, or 14 of 100, come by chance once in 2000 times.
    assert false_findings(of_times, 200) <= 22
    assert false_findings(of_means, 200) <= 22
    assert false_findings(corrected, 100) <= 14
    assert false_findings(of_several_means, 20) <= 6


def test_tests_find_a_difference() -> None:
    rng = np.random.default_rng(0)
    fast, slow = rng.lognormal(0, 0.1, size=20), rng.lognormal(0.3, 0.1, size=20)
    found = mann_whitney(slow.tolist(), fast.tolist())
    assert found.p_value < 1e-4 and 0 < found.low < found.difference < found.high
    assert found.low < math.exp(0.3) - 1 < found.high
    found = welch([2.0, 2.1, 1.9, 2.05, 1.95], [1.0, 1.1, 0.9, 1.05, 0.95])
    assert found.p_value < 1e-4 and found.low < 1.0 < found.high and found.low > 0.8
