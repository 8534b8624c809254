"""Time several participants in turn, round by round, so that a machine that drifts affects all alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from harness.measure.statistics import percentile
from harness.measure.time import time_call_ms
from harness.record.outcomes import outcome

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)


class Failure(NamedTuple):
    """The reason for a missing measurement: a status of harness.record.schema, and a sentence."""

    status: str
    reason: str


class Probe(Protocol[Result]):
    """One participant at one cell. Its constructor makes the first call and warms it up.

    first_call_ms: duration of the first call, including compilation and tuning.
    """

    first_call_ms: float

    def sample(self) -> None:
        """Take one timed sample."""

    def measurement(self) -> Result:
        """Return the numbers of the samples taken."""


@dataclass
class TimingRun:
    """Data that the cells of one timing job share.

    device:   the device on which every participant runs.
    too_slow: participant (a key that the task chooses) -> the context, in tokens, that took too long.
    """

    device: torch.device
    too_slow: dict[Hashable, int] = field(default_factory=dict)
    _numbers: dict[Hashable, float] = field(default_factory=dict)

    def once(self, key: Hashable, measure: Callable[[], float]) -> float:
        """Return measure(), which is called only the first time that this key is given."""
        if key not in self._numbers:
            self._numbers[key] = measure()
        return self._numbers[key]


def take_turns(
    make: Callable[[str], Probe[T]],
    names: Sequence[str],
    *,
    num_rounds: int,
    max_first_call_s: float,
    is_retried_alone: bool,
    on_turn: Callable[[str], None],
) -> Iterator[tuple[str, T | Failure]]:
    """Make a probe for each name, sample all of them num_rounds times, and yield each one's outcome.

    An exception of a probe, whatever its class, is a failure of that participant alone. A first call that
    takes longer than max_first_call_s is a timeout.

    is_retried_alone: whether a participant that runs out of memory beside others is tried once more after
                      them, when their memory is free.
    on_turn:          called with a name before its turn. Its own errors are raised.
    """
    probes: dict[str, Probe[T]] = {}
    retried: list[str] = []
    results: dict[str, T] = {}

    def start(name: str) -> None:
        probes[name] = make(name)

    def finish(name: str) -> None:
        results[name] = probes.pop(name).measurement()

    def is_retried(failure: Failure) -> bool:
        return is_retried_alone and failure.status == "oom" and bool(probes)

    for name in names:
        on_turn(name)
        failure = _attempt(partial(start, name))
        if failure is None and probes[name].first_call_ms > 1e3 * max_first_call_s:
            seconds = probes.pop(name).first_call_ms / 1e3
            failure = Failure(
                "timeout", f"the first call took {seconds:.1f} s, more than max_cell_s={max_first_call_s:g}"
            )
        if failure is not None and is_retried(failure):
            retried.append(name)
        elif failure is not None:
            yield name, failure
    for name in rounds(probes, num_rounds):
        on_turn(name)
        failure = _attempt(probes[name].sample)
        if failure is None:
            continue
        del probes[name]
        if is_retried(failure):
            retried.append(name)
        else:
            yield name, failure
    for name in list(probes):
        failure = _attempt(partial(finish, name))
        yield name, results.pop(name) if failure is None else failure
    for name in retried:
        yield from take_turns(
            make,
            [name],
            num_rounds=num_rounds,
            max_first_call_s=max_first_call_s,
            is_retried_alone=False,
            on_turn=on_turn,
        )


def _attempt(call: Callable[[], None]) -> Failure | None:
    """Make a call; return its failure, if any. The exception is not kept, because it holds tensors."""
    try:
        call()
    except Exception as error:
        return Failure(*outcome(error))
    return None


def rounds(names: Collection[str], num_rounds: int, *, is_reversing: bool = False) -> Iterator[str]:
    """Yield the name whose turn it is. Names that leave the collection get no further turn.

    is_reversing: whether every second round runs backwards, so that no name always comes first."""
    for index in range(num_rounds):
        order = list(names)
        for name in reversed(order) if is_reversing and index % 2 else order:
            if name in names:
                yield name


def in_turn(
    ours: Callable[[], object], peer: Callable[[], object], num_rounds: int, device: torch.device
) -> dict[str, Any]:
    """Time two warm calls in turn and compare them round by round.

    Return our_ms and peer_ms, one time per round; speed, the median over the rounds of the peer's time
    divided by ours; and speed_quartiles."""
    calls = {"ours": ours, "peer": peer}
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for name in rounds(calls, num_rounds, is_reversing=True):
        times_ms[name].append(time_call_ms(calls[name], device))
    speeds = [theirs / own for theirs, own in zip(times_ms["peer"], times_ms["ours"], strict=True)]
    return {
        "speed": percentile(speeds, 0.5),
        "speed_quartiles": quartiles(speeds),
        "our_ms": times_ms["ours"],
        "peer_ms": times_ms["peer"],
    }


def quartiles(samples: Sequence[float]) -> list[float]:
    """Return the first and the third quartile."""
    return [percentile(samples, 0.25), percentile(samples, 0.75)]
