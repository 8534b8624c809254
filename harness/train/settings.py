"""The trainer's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.config.compose import resolve as resolve

#: Settings of conf/train that are not the trainer's own.
NOT_TRAINER_KEYS = ("name", "stream", "search", "search_grid", "by_size", "peak_learning_rate")


def peak_rate(config: Mapping[str, Any]) -> float:
    """The learning rate to train at without a search: the recipe's, where it has one, else the
    architecture's."""
    rate: float = config["train"].get("peak_learning_rate", config["arch"]["learning_rate"])
    return rate


def training_settings(config: Mapping[str, Any], learning_rate: float) -> Training:
    """The trainer's settings at one learning rate; raises ValueError where one is out of its range."""
    settings = {key: value for key, value in config["train"].items() if key not in NOT_TRAINER_KEYS}
    return Training(**{**settings, "betas": tuple(settings["betas"])}, learning_rate=learning_rate)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of one training run (conf/train).

    num_steps:            optimiser steps.
    learning_rate:        the peak; final_ratio times it is reached at the last step, or final_learning_rate
                          where that is given.
    warmup_fraction:      of the steps, linear from 0.
    betas, weight_decay, gradient_clip: of AdamW; matrices alone decay.
    validation_interval_steps: between validation losses; the last step always validates.
    max_skipped_steps:    a step whose loss or gradient is not finite changes nothing and is counted;
                          one more than these is a divergence.
    micro_batch_tokens:   rows of a batch that go through the model together, in tokens (one row at least);
                          their gradients add up to the batch's. None: the whole batch at once.
    checkpoint_interval_s: between saves of the training state, from which a cut run continues.

    Raises ValueError for a value outside its range.
    """

    num_steps: int
    learning_rate: float
    warmup_fraction: float = 0.1
    final_ratio: float = 0.1
    final_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    validation_interval_steps: int = 100
    max_skipped_steps: int = 10
    micro_batch_tokens: int | None = None
    checkpoint_interval_s: float = 30.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"train.num_steps={self.num_steps} must be positive")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        final = self.final_learning_rate
        if final is not None and not 0 <= final <= self.learning_rate:
            raise ValueError(
                f"train.final_learning_rate={final} must lie between 0 and the peak, {self.learning_rate}"
            )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ValueError(f"train.micro_batch_tokens={self.micro_batch_tokens} must be positive")
        interval = self.validation_interval_steps
        if interval < 1:
            raise ValueError(f"train.validation_interval_steps={interval} must be positive")
        if not self.gradient_clip > 0:
            raise ValueError(f"train.gradient_clip={self.gradient_clip} must be positive")
        for name in ("warmup_fraction", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must lie between 0 and 1")
        for name in ("weight_decay", "max_skipped_steps", "checkpoint_interval_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={list(self.betas)} must lie between 0 and 1, 1 left out")

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        warmup = max(1, round(self.warmup_fraction * self.num_steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - 1 - warmup)
        cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        final = self.final_learning_rate
        final = self.final_ratio * self.learning_rate if final is None else final
        return final + (self.learning_rate - final) * cosine
