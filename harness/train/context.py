"""The context of a job: its configuration, device, data and records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harness.config.schema import JobConfig
from harness.record.writer import RecordWriter


@dataclass
class JobContext:
    """The objects that all steps of a model job share."""

    config: JobConfig
    device: torch.device
    dtype: torch.dtype
    corpus: Any
    stream: Any
    logbook: RecordWriter

    @property
    def identity(self) -> tuple[str, str, int]:
        """Architecture, size and seed."""
        return self.config.arch.name, self.config.size.name, self.config.seed

    def begin_training(self) -> None:
        """Attribute any crash from here on to training, unless training is already recorded."""
        if self.logbook.done(*self.identity, "train", {}) is None:
            self.logbook.begin(*self.identity, "train", {})
