"""The contract of tasks: what a task gets, and what it must offer."""

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
    """The result of one cell, with the fields of harness.record.schema.Point.

    metrics: name -> number; the name ends with the unit.
    samples: name -> raw samples behind the metrics.
    details: anything else worth keeping.
    """

    metrics: dict[str, float | int | None]
    samples: dict[str, list[Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """Everything that a task may use besides the model.

    trained_lengths_tokens: sequence lengths that the model was trained on. A task can mark its longer cells.
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
    """The part that all tasks have in common: a name, declared metrics, and a grid of cells.

    METRICS:       declarations of the numbers of its points. Writing any other number is an error.
    CELL_SETTINGS: the constructor's arguments that only choose which cells exist. A cell's number does not
                   depend on them, so they are not part of its identity.
    """

    name: ClassVar[str]
    METRICS: ClassVar[tuple[Metric, ...]]
    CELL_SETTINGS: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def cells(self) -> list[dict[str, Any]]:
        """Return the coordinates of every cell, as JSON values, in the order of measurement."""

    def require_declared(self, measurement: Measurement) -> None:
        """Raise ValueError where a measurement has numbers that METRICS does not declare, naming them."""
        undeclared = sorted(measurement.metrics.keys() - {metric.name for metric in self.METRICS})
        if undeclared:
            raise ValueError(
                f"tasks.{self.name} measured {', '.join(undeclared)}, which its METRICS do not declare; "
                "declare a unit, a direction and a kind for each."
            )


class Task(CellGrid):
    """A task that measures one model at a time, cell by cell; a sweep that stops keeps its finished cells."""

    @abstractmethod
    def prepare(self, inputs: TaskInputs) -> None:
        """Check the input and build the examples, once, before the first cell.

        Raises ValueError with one sentence where the input does not fit the task."""

    @abstractmethod
    def measure(self, model: SequenceModel, cell: dict[str, Any]) -> Measurement:
        """Measure one cell. The same model, inputs and cell give the same measurement."""


class TimingTask(CellGrid):
    """A task that times several models in turn, so that a machine that drifts affects all alike."""

    @abstractmethod
    def measure_in_turn(
        self,
        models: Mapping[str, SequenceModel],
        cell: dict[str, Any],
        run: TimingRun,
        on_turn: Callable[[str], None],
    ) -> Iterator[tuple[str, Measurement | Failure]]:
        """Measure one cell for all models, and yield each one's name and outcome.

        A model that fails yields a failure, and the others are measured.

        run:     data that the cells share; the same object for every cell of a job.
        on_turn: called with a model's name before its turn, so that a death of the process can be attributed
                 to that model."""


def require_positive(path: str, **values: int) -> None:
    """Raise ValueError for the first value below 1, naming it and its place in the configuration."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{path}.{name}={value} must be positive.")
