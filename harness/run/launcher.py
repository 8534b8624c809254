"""The interface of what runs the jobs of an experiment: `launcher=NAME`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.record.schema import Point


@dataclass(frozen=True, kw_only=True)
class LaunchedJob:
    """One job, ready to run.

    spec, output, timeout_s: as `harness.run.supervision.run_job` takes them.
    is_timing: its times count, so that nothing may run beside it.
    """

    spec: dict[str, Any]
    output: Path
    timeout_s: float
    is_timing: bool

    @property
    def name(self) -> str:
        """The job's name, unique in its experiment."""
        return str(self.spec["job"])

    @property
    def num_at_once(self) -> int:
        """How many jobs may run at once while this one runs, itself included."""
        return int(self.spec["configs"][0]["num_workers"])


class Launcher(ABC):
    """Runs jobs."""

    @abstractmethod
    def run(self, jobs: Sequence[LaunchedJob], on_end: Callable[[list[Point], int], None]) -> None:
        """Run all jobs and return when the last one has ended.

        on_end: is called with the typed failures of a job that ended, and the number of jobs under way.
        Raises InputError where a job refuses its input, ValueError where the launcher cannot be used here."""
