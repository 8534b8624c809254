"""What a task declares of the numbers that it measures. Standard library only.

A task's METRICS says of each number what it is, so that reports, rankings, baselines and comparisons need no
list of their own. The declarations stand in the header of every record file, since a report does not import
the tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Direction = Literal["higher", "lower", "neither"]
Kind = Literal["quality", "cost", "training"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a task's points.

    name:       its key in Point.metrics, unit last.
    label:      what a table heads its column with, without the unit.
    unit:       "ms", "bytes", "bits/byte", "tokens/s", ...; "share" for numbers from 0 to 1; "" for counts.
    direction:  which is better; "neither" for counts, conditions and ends of intervals.
    kind:       quality (what a model gets right), cost (time, memory, FLOPs) or training.
    low, high:  names of the metrics that hold the ends of its interval, where it has one.
    tolerance:  how much worse it may get before `make regress` fails, in its unit; 0: it must stay equal;
                None: it is not compared.
    is_compared_on_mean: compare its mean over the task's cells instead of every cell, where one is too noisy.
    is_headline: whether it stands for the task in a summary; the first one of a task is shown in rankings.
    """

    name: str
    label: str
    unit: str
    direction: Direction
    kind: Kind
    low: str | None = None
    high: str | None = None
    tolerance: float | None = None
    is_compared_on_mean: bool = False
    is_headline: bool = False

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(f"direction={self.direction!r} must be one of {', '.join(get_args(Direction))}.")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(get_args(Kind))}.")

    @property
    def is_better_higher(self) -> bool:
        """Return whether more is better."""
        return self.direction == "higher"


def to_plain(metrics: Iterable[Metric]) -> list[dict[str, Any]]:
    """Return declarations as JSON values."""
    return [dataclasses.asdict(metric) for metric in metrics]


def from_plain(values: Iterable[Mapping[str, Any]]) -> tuple[Metric, ...]:
    """Return the declarations that `to_plain` wrote; keys that this version does not know are left out.

    Raises ValueError or TypeError where a value is no declaration."""
    known = {field.name for field in dataclasses.fields(Metric)}
    return tuple(Metric(**{key: value[key] for key in value if key in known}) for value in values)
