"""Make what a header says about the numbers of its job: the declarations and the identities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import get_class

from harness.config.schema import JobConfig
from harness.record import identity
from harness.record.metrics import Metric
from harness.run.cost_card import METRICS as COST_METRICS
from harness.run.timing_job import CALIBRATION_METRICS
from harness.train.adapted_model import ADAPTED_METRICS
from harness.train.trained_model import SEARCH_METRICS, TRAIN_METRICS
from tasks.base import Task


def declarations(configs: Sequence[JobConfig]) -> dict[str, tuple[Metric, ...]]:
    """Return the metrics of every task that the job of these configurations can write points of."""
    declared: dict[str, tuple[Metric, ...]] = {
        "train": (*TRAIN_METRICS, *ADAPTED_METRICS),
        "learning_rate_search": SEARCH_METRICS,
        "calibration": CALIBRATION_METRICS,
        "cost": COST_METRICS,
    }
    for config in configs:
        for task, _ in _tasks(config):
            declared[task.name] = task.METRICS
    return declared


def identities(
    kind: str,
    configs: Sequence[JobConfig],
    *,
    environment: Mapping[str, Any],
    config: Mapping[str, Any],
    data_hash: str | None,
) -> dict[str, dict[str, str]]:
    """Return architecture -> task -> identity of the results that a job is about.

    kind:   "latency" for a timing job, else a model job.
    config: as in the header: the same functions find the identity of an older record from it.
    """
    found: dict[str, dict[str, str]] = {}
    if kind == "latency":
        found[""] = {"calibration": identity.machine_identity("calibration", environment)}
    for one in configs:
        arch = one.arch.to_plain()
        found[one.arch.name] = (
            _timed(one, arch, config, environment)
            if kind == "latency"
            else _trained(one, arch, config, {"device": environment["device"], "data": data_hash})
        )
    return found


def _timed(
    job: JobConfig, arch: Mapping[str, Any], config: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, str]:
    return {
        task.name: identity.timed_identity(config, arch, task.name, settings, environment=environment)
        for task, settings in _tasks(job)
        if not issubclass(task, Task)
    }


def _trained(
    job: JobConfig, arch: Mapping[str, Any], config: Mapping[str, Any], trained: dict[str, Any]
) -> dict[str, str]:
    found = {
        task.name: identity.trained_identity(config, arch, settings, **trained)
        for task, settings in _tasks(job)
        if issubclass(task, Task)
    }
    found["train"] = identity.trained_identity(config, arch, {}, **trained)
    found["cost"] = identity.counted_identity(config, arch)
    found["learning_rate_search"] = identity.search_identity(config, arch, **trained)
    return found


def _tasks(job: JobConfig) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each task's class with its settings, without those that only choose its cells."""
    for settings in (job.tasks | job.arch.tasks).values():
        task: Any = get_class(settings["_target_"])
        cell_settings = task.CELL_SETTINGS
        yield task, {key: value for key, value in settings.items() if key not in cell_settings}
