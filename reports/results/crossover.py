"""Where a cost curve crosses the reference architecture's, interpolated between measured points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

#: The architecture every other is held against.
REFERENCE_ARCH = "transformer"

Curve = Mapping[float, float]
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """One crossing of a curve and the reference.

    context_tokens, value:  the crossing, interpolated linearly in log-log.
    is_below_after:         True where the curve costs less than the reference beyond it.
    between_tokens:         the two measured contexts on either side.
    is_clear:               whether the curves' spreads are apart at both of those contexts; None
                            where no spread is known.
    """

    context_tokens: float
    value: float
    is_below_after: bool
    between_tokens: tuple[float, float]
    is_clear: bool | None = None


def shared_contexts(curve: Curve, reference: Curve) -> list[float]:
    """The contexts at which both are known and positive, in order."""
    return sorted(x for x in curve if x > 0 and curve[x] > 0 and reference.get(x, 0) > 0)


def crossovers(
    curve: Curve,
    reference: Curve,
    curve_spread: Mapping[float, Interval] | None = None,
    reference_spread: Mapping[float, Interval] | None = None,
) -> list[Crossover]:
    """All crossings of two curves (context in tokens -> cost), lowest context first.

    Contexts at which the two are equal belong to no side: the crossing is looked for between the
    nearest contexts at which they differ. Only contexts measured for both are used; nothing is
    extrapolated. The spreads are (low, high) a context."""
    differing = [
        (x, math.log(curve[x] / reference[x]))
        for x in shared_contexts(curve, reference)
        if curve[x] != reference[x]
    ]
    found = []
    for (x0, gap0), (x1, gap1) in pairwise(differing):
        if (gap0 < 0) == (gap1 < 0):
            continue
        share = gap0 / (gap0 - gap1)
        found.append(
            Crossover(
                context_tokens=_interpolate(x0, x1, share),
                value=_interpolate(reference[x0], reference[x1], share),
                is_below_after=gap1 < 0,
                between_tokens=(x0, x1),
                is_clear=_are_apart((x0, x1), curve_spread, reference_spread),
            )
        )
    return found


def _interpolate(start: float, end: float, share: float) -> float:
    return math.exp((1 - share) * math.log(start) + share * math.log(end))


def _are_apart(
    contexts: tuple[float, float],
    first: Mapping[float, Interval] | None,
    second: Mapping[float, Interval] | None,
) -> bool | None:
    if not first or not second or any(x not in first or x not in second for x in contexts):
        return None
    return all(first[x][1] < second[x][0] or second[x][1] < first[x][0] for x in contexts)
