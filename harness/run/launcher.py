"""The interface of what runs the jobs of a plan: `launcher=NAME`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from harness.record.schema import Point
from harness.run.job import JobSpec


class Launcher(ABC):
    """Runs jobs.

    is_local: jobs run on this machine and share it.
    """

    is_local: ClassVar[bool]

    @abstractmethod
    def run(self, jobs: Sequence[JobSpec], on_end: Callable[[list[Point], int], None]) -> None:
        """Run all jobs and return when the last one has ended.

        on_end: is called with the typed failures of a job that ended, and the number of jobs under way.
        Raises InputError where a job refuses its input, ValueError where the launcher cannot be used here."""
