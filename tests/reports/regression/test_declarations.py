"""A task that declares a tolerance is guarded, without a change in reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.record.metrics import Metric
from harness.record.schema import Point
from reports.regression.baseline import condense, declared_metrics, read_baseline, write_baseline
from reports.regression.compare import compare
from reports.results.load import Results


@dataclass(frozen=True, kw_only=True)
class OneTask(Results):
    """Results of a task that no other file knows."""

    declared: Metric

    def metrics(self, task: str) -> tuple[Metric, ...]:
        return (self.declared,) if task == "recall" else ()


def measured(metric: Metric, *values: float) -> OneTask:
    """Results of one architecture with a cell per value."""
    points = [
        Point(
            run_id="run",
            arch="mamba",
            size="tiny",
            seed=0,
            task="recall",
            cell={"num_pairs": index, "phase": "answer"},
            metrics={metric.name: value},
        )
        for index, value in enumerate(values)
    ]
    return OneTask(folders=[], headers=[], series=[], points=points, declared=metric)


def verdicts(path: Path, metric: Metric, before: list[float], now: list[float]) -> dict[str, str]:
    """What is said of each number when it is compared with a baseline that was written and read again."""
    write_baseline(path, condense(measured(metric, *before)))
    results = measured(metric, *now)
    changes = compare(read_baseline(path), condense(results), declared_metrics(results))
    return {change.what: change.verdict for change in changes}


def accuracy(**changes: Any) -> Metric:
    fields = {"name": "accuracy", "label": "accuracy", "unit": "share", "direction": "higher"}
    return Metric(**({**fields, "kind": "quality", "tolerance": 0.1} | changes))


@pytest.mark.parametrize(
    ("metric", "now", "expected"),
    [
        (accuracy(), 0.45, None),
        (accuracy(), 0.35, "worse"),
        (accuracy(), 0.65, "improved"),
        (accuracy(direction="lower"), 0.35, "improved"),
        (accuracy(direction="lower"), 0.65, "worse"),
        (accuracy(direction="neither"), 0.35, "differs"),
        (accuracy(direction="neither"), 0.65, "differs"),
        (accuracy(tolerance=0), 0.5 + 1e-9, "differs"),
    ],
)
def test_a_cell_is_compared_as_its_task_declares(
    tmp_path: Path, metric: Metric, now: float, expected: str | None
) -> None:
    name = "recall.accuracy at num_pairs=1, phase=answer"
    found = verdicts(tmp_path / "baseline.json", metric, [0.5, 0.5], [0.5, now])
    assert found == ({} if expected is None else {name: expected})


def test_a_metric_without_a_tolerance_is_not_compared() -> None:
    entry = condense(measured(accuracy(tolerance=None), 0.5)).entries["mamba tiny seed 0"]
    assert entry.exact == entry.quality == entry.time == {} and len(entry.cells) == 1


def test_a_mean_is_compared_where_the_task_says_so(tmp_path: Path) -> None:
    metric = accuracy(is_compared_on_mean=True)
    path = tmp_path / "baseline.json"
    assert verdicts(path, metric, [0.5, 0.5], [0.9, 0.1]) == {}
    assert verdicts(path, metric, [0.5, 0.5], [0.4, 0.3]) == {"recall.accuracy": "worse"}


def test_a_number_that_the_baseline_lacks_is_new(tmp_path: Path) -> None:
    found = verdicts(tmp_path / "baseline.json", accuracy(), [0.5], [0.5, 0.0])
    assert set(found.values()) == {"new"} and "recall.accuracy at num_pairs=1, phase=answer" in found


def test_times_are_kept_as_ratios_where_they_are_a_tasks_headline() -> None:
    fields = {"label": "time", "direction": "lower", "kind": "cost"}
    calibration = Point(
        run_id="run", arch="", size="tiny", seed=0, task="calibration", cell={}, metrics={"matmul_ms": 4.0}
    )

    def kept(**changes: Any) -> dict[str, float]:
        results = measured(Metric(**(fields | changes)), 2.0)
        results.points.append(calibration)
        return condense(results).entries["mamba tiny seed 0"].time

    name = "at num_pairs=0, phase=answer"
    assert kept(name="median_ms", unit="ms", is_headline=True) == {f"recall.median_ms {name}": 0.5}
    assert kept(name="pass_s", unit="s", is_headline=True) == {f"recall.pass_s {name}": 500.0}
    assert kept(name="first_call_ms", unit="ms") == {}
