"""What tasks declare of their numbers is what they write, and what records of schema version 1 hold."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from harness.record import metrics_of_version_1, migration
from tasks.adaptation import Adaptation
from tasks.base import CellGrid, Measurement, Task, TaskInputs, TimingTask
from tasks.latency import Latency
from tasks.needle import Needle
from tasks.perplexity import Perplexity
from tasks.training_speed import TrainingSpeed
from tests.tasks.conftest import ReaderModel

TASKS: list[type[CellGrid]] = [Perplexity, Needle, Latency, TrainingSpeed, Adaptation]


@pytest.mark.parametrize("task", TASKS)
def test_the_declarations_are_those_that_old_records_are_read_with(task: type[CellGrid]) -> None:
    assert metrics_of_version_1.METRICS[task.name] == task.METRICS


@pytest.mark.parametrize("task", TASKS)
def test_old_records_are_identified_without_the_settings_that_only_choose_cells(task: type[CellGrid]) -> None:
    assert migration.CELL_SETTINGS.get(task.name, ()) == task.CELL_SETTINGS
    assert (task.name in migration.TIMING_TASKS) == issubclass(task, TimingTask)


@pytest.mark.parametrize("task", TASKS)
def test_a_declaration_is_whole(task: type[CellGrid]) -> None:
    names = [metric.name for metric in task.METRICS]
    assert len(set(names)) == len(names)
    assert [metric.name for metric in task.METRICS if metric.is_headline], "a summary has a number to show"
    ends = {end for metric in task.METRICS for end in (metric.low, metric.high) if end is not None}
    assert ends <= set(names)
    assert all(metric.direction == "neither" for metric in task.METRICS if metric.name in ends)
    assert set(task.CELL_SETTINGS) <= inspect.signature(task).parameters.keys()


SMALL: list[tuple[Task, dict[str, Any]]] = [
    (Perplexity(context_lengths_tokens=[8], num_documents=2), {"context_tokens": 8}),
    (
        Needle(lengths_tokens=[128], depths=[0.5], num_examples=2, num_needles=2),
        {"context_tokens": 128, "depth": 0.5},
    ),
]


@pytest.mark.parametrize(("task", "cell"), SMALL, ids=["perplexity", "needle"])
def test_a_task_writes_what_it_declares(task: Task, cell: dict[str, Any], inputs: TaskInputs) -> None:
    task.prepare(inputs)
    measured = task.measure(ReaderModel(), cell)
    assert measured.metrics.keys() == {metric.name for metric in task.METRICS}


def test_a_number_that_is_not_declared_is_refused() -> None:
    task, _ = SMALL[0]
    task.require_declared(Measurement(metrics={"bits_per_byte": 1.0}))
    with pytest.raises(ValueError, match=r"tasks\.perplexity measured speed, which its METRICS do not"):
        task.require_declared(Measurement(metrics={"bits_per_byte": 1.0, "speed": 2.0}))


def test_the_needles_of_a_cell_do_not_depend_on_the_other_cells(inputs: TaskInputs) -> None:
    measured = []
    for lengths, depths in (([128], [0.5]), ([256, 128], [0.0, 0.5, 1.0])):
        task = Needle(lengths_tokens=lengths, depths=depths, num_examples=3)
        task.prepare(inputs)
        measured.append(task.measure(ReaderModel(), {"context_tokens": 128, "depth": 0.5}))
    assert measured[0] == measured[1]
