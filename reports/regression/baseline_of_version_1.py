"""Migrate baselines of schema version 1, whose numbers were not named by their task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TASKS = {
    "bits_per_byte": "perplexity",
    "answer_log_probability_nats": "needle",
    "final_validation_bits_per_byte": "train",
}


def migrate(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a baseline of version 1, as its file holds it, in the form of version 2.

    Raises KeyError, TypeError, ValueError or AttributeError where the file is damaged."""
    return {
        "entries": {key: _entry(entry) for key, entry in value["entries"].items()},
        "tolerances": {f"{task}.{name}": value["tolerances"][name] for name, task in TASKS.items()},
    }


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **entry,
        "exact": {_at_context(f"cost.{name}"): number for name, number in entry["exact"].items()},
        "quality": {
            _at_context(f"{TASKS[name.split(' at ')[0]]}.{name}"): number
            for name, number in entry["quality"].items()
        },
        "time": {_time(name): ratio for name, ratio in entry["time"].items()},
    }


def _at_context(name: str) -> str:
    return name.replace(" at ", " at context_tokens=")


def _time(name: str) -> str:
    if name == "training":
        return "train.train_seconds"
    return "latency.median_ms at " + name.removeprefix("latency ")
