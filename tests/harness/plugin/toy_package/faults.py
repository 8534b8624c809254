"""A task whose cells go wrong in every way that a measurement can."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from archs.base import SequenceModel
from harness.record.metrics import Metric
from tasks.base import Measurement, Task, TaskInputs


class Faults(Task):
    """One cell for each name in `faults`; every start of one is a line in the file `log`."""

    name = "faults"
    METRICS = (Metric(name="answer", label="answer", unit="", direction="higher", kind="quality"),)
    CELL_SETTINGS = ("faults",)

    def __init__(self, *, faults: Sequence[str], log: str, prepare_fault: str | None = None) -> None:
        self.faults, self.log, self.prepare_fault = list(faults), Path(log), prepare_fault

    def cells(self) -> list[dict[str, Any]]:
        return [{"fault": fault} for fault in self.faults]

    def prepare(self, inputs: TaskInputs) -> None:
        if self.prepare_fault is not None:
            self._happen(self.prepare_fault)

    def measure(self, model: SequenceModel, cell: dict[str, Any]) -> Measurement:
        self._happen(cell["fault"])
        return Measurement(metrics={"undeclared" if cell["fault"] == "undeclared" else "answer": 42})

    def _happen(self, fault: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{fault}\n")
        kind = fault.partition("-")[0]
        if kind == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "killedlater":  # the second time alone
            if self.log.read_text().split().count(fault) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "oom":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        elif kind == "mistake":
            raise IndexError("list index out of range")
        elif kind == "unsupported":
            raise NotImplementedError("no such length")
        elif kind == "sleep" or (kind == "sleeponce" and self.log.read_text().count("sleeponce") == 1):
            time.sleep(60)
        elif kind == "refuse":  # a mistake of the user's, found when another job is in its cell "sleep"
            deadline = time.monotonic() + 60
            while "sleep" not in self.log.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            raise ValueError("no such text")
        elif kind == "exit":
            os._exit(7)
