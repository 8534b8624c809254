"""What a job has at hand while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harness.config.schema import JobConfig
from harness.record.writer import Logbook


@dataclass
class Job:
    """What the steps of a quality job share."""

    config: JobConfig
    device: torch.device
    dtype: torch.dtype
    corpus: Any
    stream: Any
    logbook: Logbook

    @property
    def identity(self) -> tuple[str, str, int]:
        """arch, size, seed."""
        return self.config.arch.name, self.config.size.name, self.config.seed

    def begin_training(self) -> None:
        """Puts a death from here on down to training, unless that is recorded already."""
        if self.logbook.done(*self.identity, "train", {}) is None:
            self.logbook.begin(*self.identity, "train", {})
