"""Everything that a job will build, checked before any of it is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archs.implementations import check_implementations
from harness.config.check_experts import check_experts
from harness.config.compose import resolve as resolve
from harness.config.schema import check_call, check_root, check_targets, check_values
from harness.train.settings import NOT_TRAINER_KEYS, Training, peak_rate, training_settings


def check_config(config: Mapping[str, Any]) -> None:
    """Everything that a job will build, before it builds any of it.

    Raises ValueError with one sentence that names the mistake and the valid choices."""
    check_root(config)
    check_implementations(config["implementation"])
    check_targets(config["arch"]["model"], "arch.model")
    check_targets(config["reference"]["model"], "reference.model")
    for name, task in config["tasks"].items():
        check_targets(task, f"tasks.{name}")
    check_targets(config["data"]["corpus"], "data.corpus")
    num_tokens = config["data"]["vocab_size"]
    num_rows = config["arch"]["model"].get("vocab_size", num_tokens)
    if num_tokens > num_rows:
        raise ValueError(
            f"data.vocab_size={num_tokens} is more than the {num_rows} tokens of "
            f"arch={config['arch']['name']} at size={config['size']['name']}; choose another."
        )
    train = config["train"]
    settings = {key: value for key, value in train.items() if key not in NOT_TRAINER_KEYS}
    if "learning_rate" in settings:
        raise ValueError("train.learning_rate is not a setting: the rate is arch.learning_rate.")
    check_call(Training, settings, "train", "harness.train.settings.Training", is_partial=True)
    check_values(train, {"search": bool, "search_grid": list[float]}, "train")
    if train["search"] and not train["search_grid"]:
        raise ValueError("train.search_grid=[] must hold at least one learning rate; or train.search=false.")
    check_values(train, {"peak_learning_rate": float, "by_size": dict[str, Any]}, "train")
    rates = train["search_grid"] if train["search"] else [peak_rate(config)]
    for rate in [] if config["arch"].get("is_pretrained") else rates:
        training_settings(config, rate)
    check_targets({**train["stream"], "_partial_": True}, "train.stream")  # the corpus is added later
    if config["arch"].get("expert_training") is not None:  # first: the arch's own tasks may refer to it
        check_experts(config["arch"], config["reference"])
    for name, task in config["arch"].get("tasks", {}).items():
        check_targets(task, f"arch.tasks.{name}")
