"""Where two cost curves cross."""

from __future__ import annotations

import pytest

from reports.results.crossover import crossovers


def test_power_laws_cross_where_algebra_says() -> None:
    contexts = [2.0**power for power in range(8, 16)]
    curve, reference = {x: 3.0 * x for x in contexts}, {x: 0.001 * x**2 for x in contexts}
    (crossing,) = crossovers(curve, reference)
    assert crossing.context_tokens == pytest.approx(3000.0)
    assert crossing.value == pytest.approx(9000.0)
    assert crossing.between_tokens == (2048.0, 4096.0)
    assert crossing.is_below_after and crossing.is_clear is None


def test_only_shared_contexts_are_used() -> None:
    curve, reference = {256: 2.0, 512: 9.0, 1024: 2.0}, {256: 1.0, 1024: 4.0}
    (crossing,) = crossovers(curve, reference)
    assert crossing.between_tokens == (256, 1024)
    assert crossing.context_tokens == pytest.approx(512)


def test_every_crossing_is_found_and_its_direction() -> None:
    found = crossovers({1: 2, 2: 2, 4: 2, 8: 2}, {1: 1, 2: 4, 4: 1, 8: 4})
    assert [crossing.is_below_after for crossing in found] == [True, False, True]


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_curves_on_one_side_do_not_cross(factor: float) -> None:
    reference = {1: 1.0, 2: 2.0, 4: 4.0}
    assert crossovers({x: factor * y for x, y in reference.items()}, reference) == []


def test_touching_without_changing_sides_is_no_crossing() -> None:
    assert crossovers({1: 2, 2: 1, 4: 2}, {1: 1, 2: 1, 4: 1}) == []


def test_passing_through_an_equal_point_is_one_crossing() -> None:
    (crossing,) = crossovers({1: 2.0, 2: 1.0, 4: 0.5}, {1: 1.0, 2: 1.0, 4: 1.0})
    assert crossing.context_tokens == pytest.approx(2)


@pytest.mark.parametrize(("half_width", "is_clear"), [(0.1, True), (0.6, False)])
def test_spreads_that_touch_make_a_crossing_unclear(half_width: float, is_clear: bool) -> None:
    curve, reference = {1: 2.0, 2: 2.0}, {1: 1.0, 2: 3.0}
    spreads = [{x: (y - half_width, y + half_width) for x, y in each.items()} for each in (curve, reference)]
    (crossing,) = crossovers(curve, reference, *spreads)
    assert crossing.is_clear is is_clear


def test_missing_and_zero_costs_are_left_out() -> None:
    assert crossovers({}, {1: 1.0}) == []
    assert crossovers({1: 0.0, 2: 3.0}, {1: 1.0, 2: 1.0}) == []
