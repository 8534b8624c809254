"""The names of trained models, and the keys of a configuration that decide no number.

What makes two results the same is decided in `harness.record.identity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.config.compose import resolve as resolve
from harness.record.identity import stable_hash, training_settings


def training_hash(
    config: Mapping[str, Any], model_config: Mapping[str, Any], learning_rate: float | None, data_hash: str
) -> str:
    """Return the name of a trained model in the checkpoint folder: a hash of what decides its weights."""
    return stable_hash(
        {
            "train": training_settings(config["train"]),
            "seed": config["seed"],
            "dtype": config["dtype"],
            "learning_rate": learning_rate,
            "model": model_config,
            "data": data_hash,
        }
    )


#: Where and how a job runs. num_threads and num_workers change times and, through the order of sums, a
#: trained model; a model that was trained before they were changed stands.
NOT_RESULT_KEYS = (
    "output",
    "experiment_name",
    "num_threads",
    "num_workers",
    "job_timeout_s",
    "retry_failed",
)
