"""What the header of a job's records says of its numbers: the declarations and the identities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import get_class

from harness.record.metrics import Metric
from harness.record.metrics_of_version_1 import METRICS


def declarations(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Metric, ...]]:
    """Return the metrics of every task that the job of these configurations can write points of."""
    declared = {task: METRICS[task] for task in ("train", "learning_rate_search", "cost", "calibration")}
    for config in configs:
        for task in _task_classes(config):
            declared[task.name] = getattr(task, "METRICS", METRICS.get(task.name, ()))
    return declared


def _task_classes(config: Mapping[str, Any]) -> Iterator[Any]:
    for settings in (config["tasks"] | config["arch"].get("tasks", {})).values():
        yield get_class(settings["_target_"])
