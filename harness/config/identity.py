"""What decides a number, hashed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.config.compose import resolve as resolve
from harness.record.schema import content_hash


def training_hash(
    config: Mapping[str, Any], model_config: Mapping[str, Any], learning_rate: float | None, data_hash: str
) -> str:
    """What decides a trained model: its name in the checkpoint folder."""
    ignored = ("name", "search", "search_grid", "by_size", "peak_learning_rate", "checkpoint_interval_s")
    train = {key: value for key, value in config["train"].items() if key not in ignored}
    return content_hash(
        {
            "train": train,
            "seed": config["seed"],
            "dtype": config["dtype"],
            "learning_rate": learning_rate,
            "model": model_config,
            "data": data_hash,
        }
    )


#: Where and how a job runs. num_threads and num_workers change times and, through the order of sums, a
#: trained model: what was measured before they were changed stands.
NOT_RESULT_KEYS = (
    "output",
    "experiment_name",
    "num_threads",
    "num_workers",
    "launcher",
    "job_timeout_s",
    "retry_failed",
    "interleave",
)
