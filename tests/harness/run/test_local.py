"""Jobs side by side on this machine."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.record.schema import Point
from harness.run.job import JobSpec
from harness.run.local import LocalLauncher
from harness.run.supervision import EXIT_INPUT_ERROR, InputError
from tests.conftest import compose_job

TIMEOUT_S = 30


class Process:
    """In place of a worker. `work` is called with the line of its progress bar, and returns the exit code, or
    None while it works."""

    def __init__(self, work: Callable[[int], int | None], line: int) -> None:
        self._work, self._line, self._code = work, line, None
        self.is_killed = False

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None and not self.is_killed:
            self._code = self._work(self._line)
            if self._code is None:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self._code or 0

    def kill(self) -> None:
        self.is_killed = True


def launcher(work: Callable[[int], int | None], started: list[Process] | None = None) -> LocalLauncher:
    """One whose workers do `work`; they are appended to `started`."""

    def start(spec_path: Path, line: int) -> Process:
        process = Process(work, line)
        if started is not None:
            started.append(process)
        return process

    return LocalLauncher(start_worker=start)


def jobs(output: Path, *num_at_once: int) -> list[JobSpec]:
    config = compose_job("size=nano", f"output={output}")
    return [JobSpec(is_timing=n == 1, configs=(config,), command="", num_at_once=n) for n in num_at_once]


def ignore(failures: list[Point], num_under_way: int) -> None:
    """What has ended is not looked at."""


def test_as_many_at_once_as_a_job_allows_each_on_a_line_of_its_own(tmp_path: Path) -> None:
    both, lines, counts = threading.Barrier(2), [], []

    def meet(line: int) -> int:
        both.wait(TIMEOUT_S)  # breaks, and raises, where the other does not run beside it
        lines.append(line)
        return 0

    launcher(meet).run(jobs(tmp_path, 2, 2), lambda failures, num_under_way: counts.append(num_under_way))
    assert sorted(lines) == [0, 1] and counts == [1, 0]


def test_no_more_at_once_than_a_job_allows_and_what_is_alone_waits_for_all(tmp_path: Path) -> None:
    lock, seen = threading.Lock(), []
    under_way = 0

    def work(line: int) -> int:
        nonlocal under_way
        with lock:
            under_way += 1
            seen.append(under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return 0

    launcher(work).run(jobs(tmp_path, 3, 3, 3, 3, 1, 3), ignore)
    assert len(seen) == 6 and max(seen) <= 3
    assert seen[4:] == [1, 1], "the job that runs alone, and the one after it"


def test_a_job_that_refuses_its_input_ends_those_beside_it_and_no_other_begins(tmp_path: Path) -> None:
    started: list[Process] = []

    def work(line: int) -> int | None:
        return EXIT_INPUT_ERROR if line == 1 else None

    with pytest.raises(InputError):
        launcher(work, started).run(jobs(tmp_path, 2, 2, 2), ignore)
    assert len(started) == 2 and all(process.is_killed for process in started)
    assert not list((tmp_path / "jobs").iterdir())
