"""Turn-taking: who is sampled when, and whose failure a failure is."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from harness.measure.turns import Failure, TimingRun, in_turn, rounds, take_turns

CPU = torch.device("cpu")


class Diarist:
    """A probe that writes what it does into a diary; errors: number of the call -> what it raises."""

    def __init__(
        self, name: str, diary: list[str], errors: dict[int, Exception], first_call_ms: float
    ) -> None:
        self.name, self.diary, self.errors, self.first_call_ms = name, diary, errors, first_call_ms
        self.num_calls = 0
        self._write("start")

    def sample(self) -> None:
        self._write("sample")

    def measurement(self) -> int:
        return self.num_calls

    def _write(self, what: str) -> None:
        self.diary.append(f"{self.name} {what}")
        self.num_calls += 1
        if self.num_calls in self.errors:
            raise self.errors.pop(self.num_calls)


def outcomes(
    diary: list[str], errors: dict[str, dict[int, Exception]], *, first_call_ms: float = 1.0, **settings: Any
) -> list[tuple[str, int | Failure]]:
    """The outcomes of a, b and c over two rounds."""
    defaults: dict[str, Any] = {
        "num_rounds": 2,
        "max_first_call_s": 1.0,
        "is_retried_alone": False,
        "on_turn": lambda name: None,
    }
    return list(
        take_turns(
            lambda name: Diarist(name, diary, errors.get(name, {}), first_call_ms),
            ["a", "b", "c"],
            **defaults | settings,
        )
    )


def test_all_start_and_then_each_is_sampled_once_per_round() -> None:
    diary: list[str] = []
    turns: list[str] = []
    assert outcomes(diary, {}, on_turn=turns.append) == [("a", 3), ("b", 3), ("c", 3)]
    assert diary == ["a start", "b start", "c start", *["a sample", "b sample", "c sample"] * 2]
    assert turns == ["a", "b", "c"] * 3, "every turn is announced"


@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_failure_is_an_outcome_and_the_others_go_on(when: int) -> None:
    diary: list[str] = []
    found = outcomes(diary, {"b": {when: KeyError("lost")}})
    assert found == [("b", ("crashed", "KeyError: 'lost'")), ("a", 3), ("c", 3)]
    assert sum(line.startswith("b") for line in diary) == when


@pytest.mark.parametrize(("is_retried", "expected"), [(False, ("oom", "MemoryError: full")), (True, 3)])
def test_who_runs_out_of_memory_beside_others_may_be_tried_after_them(
    is_retried: bool, expected: int | tuple[str, str]
) -> None:
    diary: list[str] = []
    errors: dict[str, dict[int, Exception]] = {"b": {2: MemoryError("full")}}
    found = outcomes(diary, errors, is_retried_alone=is_retried)
    assert dict(found) == {"a": 3, "b": expected, "c": 3}
    if is_retried:
        assert diary[-3:] == ["b start", "b sample", "b sample"], "alone, when the others are done"


def test_a_first_call_that_takes_too_long_is_a_timeout() -> None:
    diary: list[str] = []
    found = outcomes(diary, {}, first_call_ms=2500.0)
    assert [failure for _, failure in found] == [
        ("timeout", "the first call took 2.5 s, more than max_cell_s=1")
    ] * 3
    assert not [line for line in diary if line.endswith("sample")]


def test_rounds_can_change_who_comes_first() -> None:
    assert list(rounds(["a", "b"], 3)) == ["a", "b"] * 3
    assert list(rounds(["a", "b"], 3, is_reversing=True)) == ["a", "b", "b", "a", "a", "b"]
    left = ["a", "b", "c"]
    order = []
    for name in rounds(left, 2):
        order.append(name)
        if name == "b":
            left.remove("b")
    assert order == ["a", "b", "c", "a", "c"]


def test_two_calls_are_compared_round_by_round() -> None:
    result = in_turn(lambda: time.sleep(0.004), lambda: time.sleep(0.012), 5, CPU)
    assert len(result["our_ms"]) == len(result["peer_ms"]) == 5
    assert 1.5 < result["speed"] < 6
    low, high = result["speed_quartiles"]
    assert low <= result["speed"] <= high


def test_what_a_run_measures_once_is_measured_once() -> None:
    run, numbers = TimingRun(CPU), iter([1.0, 2.0, 3.0])
    assert [run.once(key, lambda: next(numbers)) for key in ("copy", "matmul", "copy")] == [1.0, 2.0, 1.0]
