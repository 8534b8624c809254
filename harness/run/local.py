"""`launcher=local`: jobs run on this machine, each in a thread that waits for its process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

from harness.record.schema import Point
from harness.run.launcher import LaunchedJob, Launcher
from harness.run.progress import tell
from harness.run.supervision import run_job


class Pool:
    """Starts a piece of work once fewer than `num_at_once` are under way.

    on_end:   is given what each piece returned and how many are still under way, in the thread that calls
              `start` and `wait`; what a piece raises is raised there.
    stopping: is set when all that is under way must end.
    """

    def __init__(self, on_end: Callable[[Any, int], None]) -> None:
        self.stopping = threading.Event()
        self._on_end = on_end
        self._lines: dict[Future[Any], int] = {}  # of what is under way

    def start(self, work: Callable[[int], Any], num_at_once: int) -> None:
        """Begins `work`, which is given the lowest free number from 0 on: the line of its progress bar. What
        runs alone, with num_at_once 1, is done on return."""
        self.wait(at_most=num_at_once - 1)
        if num_at_once == 1:
            self._on_end(work(0), 0)
            return
        line = min(set(range(num_at_once)) - set(self._lines.values()))
        future: Future[Any] = Future()
        self._lines[future] = line
        threading.Thread(target=_fulfil, args=(future, work, line), daemon=True).start()

    def wait(self, at_most: int = 0) -> None:
        """Returns when no more than `at_most` pieces are under way."""
        while len(self._lines) > at_most:
            done, _ = wait(self._lines, return_when=FIRST_COMPLETED)
            for future in done:
                del self._lines[future]
                self._on_end(future.result(), len(self._lines))

    def stop(self) -> None:
        """Sets `stopping` and returns when nothing is under way; what pieces return or raise is dropped."""
        self.stopping.set()
        wait(self._lines)
        self._lines.clear()


class LocalLauncher(Launcher):
    """Runs jobs on this machine, in their order, each beside as many others as it allows."""

    def run(self, jobs: Sequence[LaunchedJob], on_end: Callable[[list[Point], int], None]) -> None:
        """Run all jobs and return when the last one has ended. What is under way is stopped where one of them
        refuses its input or the user interrupts."""
        pool = Pool(on_end)
        try:
            for job in jobs:
                pool.start(partial(_run, job, pool.stopping), job.num_at_once)
            pool.wait()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
            raise
        finally:
            pool.stop()


def _run(job: LaunchedJob, stopping: threading.Event, line: int) -> list[Point]:
    tell(f"-- {job.name}")
    return run_job(job.spec, job.output, job.timeout_s, line=line, stopping=stopping)


def _fulfil(future: Future[Any], work: Callable[[int], Any], line: int) -> None:
    try:
        future.set_result(work(line))
    except BaseException as error:
        future.set_exception(error)
