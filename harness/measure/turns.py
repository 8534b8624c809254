"""Two calls timed in turn, round by round, so that a drifting machine is fair to both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from harness.measure.statistics import percentile
from harness.measure.time import time_call_ms


def in_turn(
    ours: Callable[[], object], peer: Callable[[], object], num_rounds: int, device: torch.device
) -> dict[str, Any]:
    """our_ms and peer_ms, a time each a round; speed, the peer's time over ours in the same round, its
    median, and speed_quartiles. Both are to be warm; who is first changes from round to round."""
    our_ms: list[float] = []
    peer_ms: list[float] = []
    for index in range(num_rounds):
        turns = [(our_ms, ours), (peer_ms, peer)]
        for times, call in turns if index % 2 == 0 else turns[::-1]:
            times.append(time_call_ms(call, device))
    speeds = [theirs / mine for theirs, mine in zip(peer_ms, our_ms, strict=True)]
    return {
        "speed": percentile(speeds, 0.5),
        "speed_quartiles": quartiles(speeds),
        "our_ms": our_ms,
        "peer_ms": peer_ms,
    }


def quartiles(samples: Sequence[float]) -> list[float]:
    """The first and the third."""
    return [percentile(samples, 0.25), percentile(samples, 0.75)]
