"""What the user is told while jobs run."""

from __future__ import annotations

import sys
import time

from harness.record.schema import Point


class Progress:
    """Counts the jobs that have ended.

    num_jobs: of the plan. Of a single job nothing is said but what failed.
    crashes:  a sentence for every cell or process that crashed.
    """

    def __init__(self, num_jobs: int) -> None:
        self.num_jobs = num_jobs
        self.crashes: list[str] = []
        self._began, self._num_done = time.monotonic(), 0

    def on_end(self, failures: list[Point], num_under_way: int) -> None:
        """Tell what failed in a job that ended, and how much time is left: by the mean of the jobs so far,
        where those under way count as half done."""
        for point in failures:
            text = f"{point.arch}, {point.task} {point.cell}: {point.status}: {point.reason}"
            tell(text)
            if point.status == "crashed":
                self.crashes.append(text)
        self._num_done += 1
        elapsed, done = time.monotonic() - self._began, self._num_done + num_under_way / 2
        left = elapsed / done * max(0, self.num_jobs - done)
        if self.num_jobs > 1:
            tell(
                f"{self._num_done}/{self.num_jobs} jobs done after {minutes(elapsed)}, "
                f"about {minutes(left)} left"
            )


def tell(text: str) -> None:
    """Print one line on stderr, in place of the progress bar that the cursor may stand on."""
    clear_line = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear_line}{text}", file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    """Return a duration in minutes and seconds."""
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
