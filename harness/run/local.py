"""`launcher=local`: jobs run on this machine, each in a thread that waits for its process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from harness.record.schema import Point
from harness.run.job import JobSpec
from harness.run.launcher import Launcher
from harness.run.progress import tell
from harness.run.supervision import StartWorker, run_job, start_worker


class LocalLauncher(Launcher):
    """Runs jobs on this machine, in their order, each beside as many others as it allows.

    start_worker: starts the process of a job.
    """

    is_local = True

    def __init__(self, *, start_worker: StartWorker = start_worker) -> None:
        self._start_worker = start_worker

    def run(self, jobs: Sequence[JobSpec], on_end: Callable[[list[Point], int], None]) -> None:
        """Run all jobs and return when the last one has ended. What is under way is stopped where one of them
        refuses its input or the user interrupts."""
        stopping = threading.Event()
        lines: dict[Future[list[Point]], int] = {}  # of the progress bars of what is under way

        def run_one(job: JobSpec, line: int) -> list[Point]:
            tell(f"-- {job.name}")
            return run_job(job, line=line, stopping=stopping, start_worker=self._start_worker)

        def wait_until(num_under_way: int) -> None:
            while len(lines) > num_under_way:
                done, _ = wait(lines, return_when=FIRST_COMPLETED)
                for future in done:
                    del lines[future]
                    on_end(future.result(), len(lines))

        with ThreadPoolExecutor(max((job.num_at_once for job in jobs), default=1)) as pool:
            try:
                for job in jobs:
                    wait_until(job.num_at_once - 1)
                    line = min(set(range(job.num_at_once)) - set(lines.values()))
                    lines[pool.submit(run_one, job, line)] = line
                    if job.num_at_once == 1:
                        wait_until(0)  # the next one may allow others beside it
                wait_until(0)
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
                raise
            finally:
                stopping.set()
