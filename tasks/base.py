"""Task: what it needs of a model, and what it measures. Nothing here is concrete."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from archs.base import SequenceModel
from harness.measure.turns import Failure, TimingRun
from harness.record.metrics import Metric
from tasks.data.corpus import Corpus
from tasks.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Measurement:
    """What one cell yields, in the words of harness.record.schema.Point.

    metrics: name -> number, units last in the name. samples: name -> the raw samples behind the
    metrics. details: anything else worth keeping.
    """

    metrics: dict[str, float | int | None]
    samples: dict[str, list[Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """What a task may use besides the model.

    trained_lengths_tokens: the sequence lengths that the model was trained on, so that a task can
    say which of its cells lie beyond them.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    device: torch.device
    seed: int
    trained_lengths_tokens: tuple[int, ...] = ()


def with_interval(metric: Metric) -> tuple[Metric, Metric, Metric]:
    """Return the metric with the ends of its 95% interval, `<name>_low` and `<name>_high`, as metrics too."""
    low, high = (
        replace(
            metric,
            name=f"{metric.name}_{end}",
            label=f"{end} end of {metric.label}",
            direction="neither",
            tolerance=None,
            is_headline=False,
        )
        for end in ("low", "high")
    )
    return replace(metric, low=low.name, high=high.name), low, high


class CellGrid(ABC):
    """What every task has: a name, the metrics of its points, and a grid of cells.

    METRICS:       what its points' numbers are; a number that is not declared is refused when it is written.
    CELL_SETTINGS: the constructor's arguments that only choose which cells there are. A cell's number does
                   not depend on them, so they are no part of its identity.
    """

    name: ClassVar[str]
    METRICS: ClassVar[tuple[Metric, ...]]
    CELL_SETTINGS: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def cells(self) -> list[dict[str, Any]]:
        """The coordinates of every cell, as JSON values, in the order they are measured."""

    def require_declared(self, measurement: Measurement) -> None:
        """Raises ValueError that names the numbers of a measurement that METRICS does not declare."""
        undeclared = sorted(measurement.metrics.keys() - {metric.name for metric in self.METRICS})
        if undeclared:
            raise ValueError(
                f"tasks.{self.name} measured {', '.join(undeclared)}, which its METRICS do not declare; "
                "declare a unit, a direction and a kind for each."
            )


class Task(CellGrid):
    """Measures one model at a time, cell by cell, so that a sweep that is stopped keeps the others."""

    @abstractmethod
    def prepare(self, inputs: TaskInputs) -> None:
        """Checks the input and builds the examples, once, before the first cell.

        Raises ValueError with one sentence where the input cannot serve."""

    @abstractmethod
    def measure(self, model: SequenceModel, cell: dict[str, Any]) -> Measurement:
        """Measures one cell. The same model, inputs and cell give the same measurement."""


class TimingTask(CellGrid):
    """Times several models in turn, so that a drifting machine is fair to all."""

    @abstractmethod
    def measure_in_turn(
        self,
        models: Mapping[str, SequenceModel],
        cell: dict[str, Any],
        run: TimingRun,
        on_turn: Callable[[str], None],
    ) -> Iterator[tuple[str, Measurement | Failure]]:
        """Measures one cell for all models, by name, and yields each one's outcome.

        A model that fails is a failure of its own, and the others are measured.

        run:     what the cells of the job share; it is the same object for every cell of a job.
        on_turn: is called with a model's name before its turn, so that the death of the process can be
                 put down to it."""


def require_positive(path: str, **values: int) -> None:
    """Raises ValueError naming the first value that is below 1, and where in the configuration it is."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{path}.{name}={value} must be positive.")
