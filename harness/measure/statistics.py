"""Percentiles, intervals and tests of samples. Imports no torch.

All intervals are two-sided at 95%, and every resampling has a fixed seed. A model trained with several seeds
has one interval, in which the seeds are the unit of replication: it gets no narrower because further seeds
read the same documents. Each test answers one question:

    mann_whitney  do two sets of times differ, whatever their distribution?
    welch         do the means of two models differ, over their seeds?
    dunnett       do the means of several models differ from one, over their seeds?
    holm          p-values of several planned comparisons, corrected
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import scipy  # scipy.stats, which takes about a second, is imported by scipy when it is first used
from numpy.typing import NDArray

LEVEL = 0.95
NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A number and the ends of its interval, which are None where the samples say nothing about a spread."""

    value: float
    low: float | None
    high: float | None

    def admits(self, value: float) -> bool:
        """Return whether the interval holds the value; without an interval, any value is possible."""
        return self.low is None or self.high is None or self.low <= value <= self.high


class Comparison(NamedTuple):
    """How much larger the first samples are than the others, the interval of that difference, and the p-value
    of "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


def percentile(samples: Sequence[float], fraction: float) -> float:
    """Return the linearly interpolated percentile, `fraction` in 0..1, of at least one sample."""
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927).

    It stays inside [0, 1] and has a width at 0 and at 1. Raises ValueError for impossible counts."""
    return wilson_interval_over_seeds([num_successes], [num_trials])


def wilson_interval_over_seeds(
    num_successes: Sequence[int], num_trials: Sequence[int]
) -> tuple[float, float]:
    """Return the score interval of the proportion that the seeds have together; one entry per seed.

    The variance of the proportion has two parts. That of the trials is the variance of a single seed, because
    the seeds may share their trials. That of the seeds is what their proportions vary beyond it, with the
    quantile of Student's distribution for their number. Wilson's interval is then that of the number of
    independent trials that have this variance (Korn and Graubard 1998). Raises ValueError for impossible
    counts."""
    for successes, trials in zip(num_successes, num_trials, strict=True):
        if trials < 1 or not 0 <= successes <= trials:
            raise ValueError(f"num_successes={successes} must lie between 0 and num_trials={trials}.")
    num_seeds = len(num_trials)
    share = sum(num_successes) / sum(num_trials)
    effective_trials = sum(num_trials) / num_seeds
    if num_seeds > 1 and 0 < share < 1:
        of_trials = share * (1 - share) / effective_trials
        of_seeds = np.var(np.divide(num_successes, num_trials), ddof=1) - of_trials
        widened = (_student_factor(num_seeds) ** 2) * max(0.0, float(of_seeds)) / num_seeds
        effective_trials = share * (1 - share) / (of_trials + widened)
    z2 = scipy.stats.norm.ppf((1 + LEVEL) / 2) ** 2 / effective_trials
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return float(low), float(high)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0
) -> tuple[float, float] | None:
    """Return the BCa bootstrap interval (Efron 1987) of sum(numerators) / sum(denominators).

    Each resample draws pairs. Where BCa is not defined, because no resample differs from the estimate to one
    side, this is the percentile interval. Return None for fewer than two pairs, which say nothing about a
    spread. Raises ValueError where the lengths differ."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if len(above) != len(below):
        raise ValueError(f"{len(above)} numerators do not pair with {len(below)} denominators.")
    if len(above) < 2:
        return None
    with _quiet():
        found = scipy.stats.bootstrap(
            (above, below),
            lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
            paired=True,
            n_resamples=NUM_RESAMPLES,
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    low, high = found.confidence_interval
    if math.isnan(low) or math.isnan(high):
        return _percentile_interval(found.bootstrap_distribution)
    return float(low), float(high)


def two_level_ratio(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]], *, seed: int = 0
) -> Estimate:
    """Return sum(numerators) / sum(denominators) over seeds and documents, with its bootstrap interval.

    numerators, denominators: one list per seed, one entry per document.

    A resample draws seeds, and then documents: the same places in all seeds where these have equally many,
    so that five identical seeds say no more than one. That is right for seeds with documents of their own,
    too. With one seed, the interval is over documents alone.

    Resampling S seeds shows (S - 1) / S of their variance, and quantiles of few seeds are those of the normal
    distribution at best. Therefore the deviations of the seeds from their mean are multiplied by
    sqrt(S / (S - 1)) (Rao and Wu 1988) and by the ratio of Student's quantile to the normal one (Hesterberg
    2015).

    The ends are None where no seed has two documents. Raises ValueError where numerators and denominators do
    not pair, or a seed has no document."""
    above = [np.asarray(row, dtype=np.float64) for row in numerators]
    below = [np.asarray(row, dtype=np.float64) for row in denominators]
    sizes, other_sizes = [len(row) for row in above], [len(row) for row in below]
    if sizes != other_sizes or 0 in sizes or not sizes:
        raise ValueError(f"Documents of the seeds do not pair: {sizes} and {other_sizes}.")
    num_seeds = len(sizes)
    value = float(sum(row.sum() for row in above) / sum(row.sum() for row in below))
    if max(sizes) < 2:
        return Estimate(value, None, None)
    if num_seeds > 1:
        further = math.sqrt(num_seeds / (num_seeds - 1)) * _student_factor(num_seeds) - 1
        above = [a + further * (a.sum() / b.sum() - value) * b for a, b in zip(above, below, strict=True)]
    for_documents, for_seeds = np.random.default_rng(seed).spawn(2)
    is_shared = len(set(sizes)) == 1
    sums_above, sums_below = (np.empty((NUM_RESAMPLES, num_seeds)) for _ in range(2))
    for index, (a, b) in enumerate(zip(above, below, strict=True)):
        if index == 0 or not is_shared:
            places = for_documents.integers(len(a), size=(NUM_RESAMPLES, len(a)))
        sums_above[:, index], sums_below[:, index] = a[places].sum(axis=1), b[places].sum(axis=1)
    seeds = for_seeds.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    drawn_above, drawn_below = (
        np.take_along_axis(sums, seeds, axis=1).sum(axis=1) for sums in (sums_above, sums_below)
    )
    return Estimate(value, *_percentile_interval(drawn_above / drawn_below))


def mann_whitney(samples: Sequence[float], others: Sequence[float]) -> Comparison:
    """Return the Mann-Whitney U test with the shift of Hodges and Lehmann (1963).

    The shift is the median of all pairwise differences. Its interval holds the shifts that the test's normal
    approximation does not reject; it is infinite where the samples are too few to reject any, such as three
    and three. Raises ValueError where there are no samples."""
    _require(1, samples, others)
    differences = np.subtract.outer(np.asarray(samples, float), np.asarray(others, float))
    gaps = np.sort(differences, axis=None)
    n, m = len(samples), len(others)
    half = scipy.stats.norm.ppf((1 + LEVEL) / 2) * math.sqrt(n * m * (n + m + 1) / 12)
    rank = math.floor(n * m / 2 - half)
    low, high = (gaps[rank - 1], gaps[-rank]) if rank >= 1 else (-math.inf, math.inf)
    with _quiet():
        p_value = scipy.stats.mannwhitneyu(samples, others).pvalue
    return Comparison(float(np.median(gaps)), float(low), float(high), float(p_value))


def welch(samples: Sequence[float], others: Sequence[float]) -> Comparison:
    """Return Welch's t-test (1947) of two means whose variances may differ.

    Where neither varies at all, the interval has no width, and p is 1 for equal means, else 0. Raises
    ValueError for fewer than two samples."""
    _require(2, samples, others)
    difference = float(np.mean(samples) - np.mean(others))
    if np.ptp(samples) == np.ptp(others) == 0:
        return _certain(difference)
    test = scipy.stats.ttest_ind(samples, others, equal_var=False)
    interval = test.confidence_interval(LEVEL)
    return Comparison(difference, float(interval.low), float(interval.high), float(test.pvalue))


def dunnett(samples: Mapping[str, Sequence[float]], control: Sequence[float]) -> dict[str, Comparison]:
    """Return Dunnett's test (1955) of several means against that of `control`, by name.

    The p-values and intervals hold for all comparisons together and need no further correction. The test
    assumes equal variances. Where nothing varies at all, see `welch`. Raises ValueError for fewer than two
    samples of any, and where there is nothing to compare."""
    _require(2, control, *samples.values())
    if not samples:
        raise ValueError("Dunnett's test needs something to compare with the control.")
    differences = {name: float(np.mean(values) - np.mean(control)) for name, values in samples.items()}
    if all(np.ptp(values) == 0 for values in (control, *samples.values())):
        return {name: _certain(difference) for name, difference in differences.items()}
    test = scipy.stats.dunnett(*samples.values(), control=control, rng=np.random.default_rng(0))
    interval = test.confidence_interval(LEVEL)
    ends = zip(interval.low.tolist(), interval.high.tolist(), test.pvalue.tolist(), strict=True)
    return {
        name: Comparison(difference, low, high, p_value)
        for (name, difference), (low, high, p_value) in zip(differences.items(), ends, strict=True)
    }


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values of several comparisons, by name, adjusted so that any of them is falsely found
    significant at most as often as the level says (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _student_factor(num_seeds: int) -> float:
    """Return Student's quantile for the mean of so many seeds, divided by the normal one."""
    upper = (1 + LEVEL) / 2
    return float(scipy.stats.t.ppf(upper, num_seeds - 1) / scipy.stats.norm.ppf(upper))


def _percentile_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _certain(difference: float) -> Comparison:
    """Return the comparison of samples that do not vary."""
    return Comparison(difference, difference, difference, float(difference == 0))


def _require(num_samples: int, *groups: Sequence[float]) -> None:
    counts = [len(group) for group in groups]
    if min(counts) < num_samples:
        raise ValueError(f"Each group needs at least {num_samples} samples for this test, not {counts}.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of scipy and numpy about samples that are all alike; the callers handle them."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
