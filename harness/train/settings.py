"""The trainer's settings at one learning rate."""

from __future__ import annotations

import math

from harness.config.schema import PositiveNumber, Recipe, TrainConfig


class Training(Recipe):
    """The settings of one training run: a recipe, and the peak of its learning rate."""

    learning_rate: PositiveNumber

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0: linear warm-up, then cosine decay."""
        warmup = max(1, round(self.warmup_fraction * self.num_steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - 1 - warmup)
        cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        final = self.final_learning_rate
        final = self.final_ratio * self.learning_rate if final is None else final
        return final + (self.learning_rate - final) * cosine


def training_settings(recipe: TrainConfig, learning_rate: float) -> Training:
    """Return the recipe's settings at one learning rate."""
    settings = {name: getattr(recipe, name) for name in Recipe.model_fields}
    return Training(**settings, learning_rate=learning_rate)
