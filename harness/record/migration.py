"""Records of version 1, read as records of today. Standard library only.

A header of version 1 holds no declarations and its points hold no identity. Both follow from the header's
configuration: the declarations are those of `metrics_of_version_1`, the identity is computed by the same
functions as today's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.record import identity
from harness.record.metrics_of_version_1 import METRICS

#: The tasks that timed several architectures in turn, and the settings that only chose the cells of a task.
TIMING_TASKS = ("latency", "training_speed")
CELL_SETTINGS: dict[str, tuple[str, ...]] = {
    "latency": ("context_lengths_tokens", "batch_sizes", "phases"),
    "training_speed": ("context_lengths_tokens", "batch_tokens"),
    "needle": ("lengths_tokens", "depths"),
    "adaptation": ("domains", "adaptations"),
}


#: The classes that today's post_training names and version 1's expert_training did not.
EXPERT_CLASSES = {
    "reinforce": "Reinforce",
    "fine_tuning": "FineTuning",
    "lora": "LoRATuning",
    "dispatch": "DispatchTraining",
    "few_shot": "FewShot",
}


class Version1:
    """Migrates the lines of one record file, in order.

    A point is migrated by its run's header, which stands before it; one without a header has no identity."""

    def __init__(self) -> None:
        self._headers: dict[str, Mapping[str, Any]] = {}
        self._identities: dict[tuple[str, str, str], str] = {}

    def header(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of today's header."""
        self._headers[value["run_id"]] = value
        return {**value, "metrics": METRICS, "identities": {}}

    def point(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of today's point."""
        key = (value["run_id"], value["arch"], value["task"])
        if key not in self._identities:
            header = self._headers.get(value["run_id"])
            self._identities[key] = "" if header is None else _identity(header, value["arch"], value["task"])
        return {**value, "identity": self._identities[key]}


def _identity(header: Mapping[str, Any], arch_name: str, task: str) -> str:
    config, environment = header["config"], header["environment"]
    archs = [config.get("arch"), *(config.get("interleaved") or [])]
    arch: Mapping[str, Any] = next((arch for arch in archs if arch and arch.get("name") == arch_name), {})
    if arch.get("expert_training") is not None:
        arch = {**arch, "post_training": _post_training(arch["expert_training"])}
    if task == "calibration":
        return identity.machine_identity(task, environment)
    if task == "cost":
        return identity.counted_identity(config, arch)
    settings = ((arch.get("tasks") or {}) | (config.get("tasks") or {})).get(task) or {}
    kept = {key: value for key, value in settings.items() if key not in CELL_SETTINGS.get(task, ())}
    if task in TIMING_TASKS:
        return identity.timed_identity(config, arch, task, kept, environment=environment)
    trained = {"device": environment.get("device"), "data": header["data_hash"]}
    if task == "learning_rate_search":
        return identity.search_identity(config, arch, **trained)
    return identity.trained_identity(config, arch, kept, **trained)


def _post_training(experts: Mapping[str, Any]) -> dict[str, Any]:
    """Return version 1's expert_training as today's post_training."""
    groups = {key: {**experts[key], "_target_": name} for key, name in EXPERT_CLASSES.items()}
    return {**experts, **groups, "_target_": "ExpertTraining"}
