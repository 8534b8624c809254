"""Intervals for what the quality tasks measure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: Of the standard normal distribution: two-sided 95%.
Z_95 = 1.959963984540054


def wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927), which stays inside [0, 1] and is not empty
    at 0 and at 1. Raises ValueError for counts that make no sense."""
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(f"num_successes={num_successes} must lie between 0 and num_trials={num_trials}.")
    share, z2 = num_successes / num_trials, Z_95**2
    centre = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    spread = math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    half = Z_95 * spread / (1 + z2 / num_trials)
    low = 0.0 if num_successes == 0 else centre - half
    high = 1.0 if num_successes == num_trials else centre + half
    return low, high


def bootstrap_ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int, num_resamples: int = 2000
) -> tuple[float, float] | None:
    """95% percentile interval (Efron 1979) of sum(numerators) / sum(denominators) when the pairs are
    drawn anew with replacement. None for fewer than two pairs, which say nothing of a spread."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if len(above) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(above), size=(num_resamples, len(above)))
    ratios = above[draws].sum(axis=1) / below[draws].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
