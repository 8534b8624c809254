"""The parent's side of a job: a process of its own, its time limit, and what becomes of a death.

Nothing here imports torch: the parent stays small, and a sweep's next job always finds it alive.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from harness.record.in_flight import InFlight, clear
from harness.record.schema import Point, read
from harness.run.job import JobSpec

#: The worker's exit codes. For a user's mistake its sentence is on stderr already.
EXIT_CRASHED = 1
EXIT_INPUT_ERROR = 2
EXIT_OUT_OF_MEMORY = 3
EXIT_INTERRUPTED = 130

#: Has glibc's allocator keep up to 1 GiB of freed memory for the next operation. By default large tensors
#: go back to the system and are asked for again, page by page, which took up to a fifth of a training step.
#: What the user has set wins, and the records' header says what it was; other C libraries read neither.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


#: How often a job's thread looks whether it must end.
POLL_S = 0.2


class WorkerProcess(Protocol):
    """A worker that was started, as subprocess.Popen."""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or raise subprocess.TimeoutExpired after `timeout` seconds."""

    def kill(self) -> object:
        """End it at once."""


#: Starts a worker on a specification; the number is the line of its progress bar.
StartWorker = Callable[[Path, int], WorkerProcess]


class InputError(ValueError):
    """The job cannot be done. Without a message, the worker has said why."""


def start_worker(spec_path: Path, line: int) -> subprocess.Popen[bytes]:
    """Start the worker in a process of its own. Ctrl-C is held back there: it is the parent's to handle."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "harness.run.worker", str(spec_path)],
            env=ALLOCATOR | os.environ | {"TQDM_POSITION": str(line)},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def run_job(
    job: JobSpec,
    *,
    line: int,
    stopping: threading.Event,
    give_up: dict[str, str] | None = None,
    start_worker: StartWorker = start_worker,
) -> list[Point]:
    """Run a job to its end and return its typed failures, whoever wrote them.

    line:         of its progress bar, from 0 down.
    stopping:     ends the worker when it is set, and this call with a KeyboardInterrupt.
    give_up:      status and reason to record for every cell that is not measured; None: measure them.
    start_worker: starts the worker's process.

    A worker that dies mid-cell is restarted at the next cell. One that times out, or dies before its first
    cell, is restarted once to record the remaining cells as failed. Raises InputError where it refuses its
    input, KeyboardInterrupt where the user interrupts.
    """
    folder = job.output / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    spec_path = folder / f"{uuid.uuid4().hex}.json"
    in_flight_path = spec_path.with_suffix(".in_flight.json")
    spec = {
        **job.to_plain(),
        "parent_pid": os.getpid(),
        "in_flight_path": str(in_flight_path),
        "run_ids": [],
        "give_up": give_up,
    }
    deadline = monotonic() + job.timeout_s
    num_lost = 0
    try:
        while True:
            spec["run_ids"] = [*spec["run_ids"], uuid.uuid4().hex[:12]]
            spec_path.write_text(json.dumps(spec))
            clear(in_flight_path)
            process = start_worker(spec_path, line)
            code, is_late = _wait(process, None if spec["give_up"] else deadline, stopping)
            if code == 0:
                return _failures(spec, job.output)
            if code == EXIT_INPUT_ERROR:
                raise InputError
            status, reason = _verdict(code, is_late, job.timeout_s)
            num_beside = job.num_at_once - 1
            if status == "oom" and num_beside:
                reason += f"; up to {num_beside} jobs ran beside it, num_workers=1 leaves it all the memory"
            is_setup = False
            note = InFlight.read(in_flight_path) if in_flight_path.exists() else None
            if note is not None and not note.is_measured():
                note.record(status, reason)
                is_setup = note.header is not None  # it died before it had written even that
            elif not is_late:  # before it began, between two cells, or where all before is done
                num_lost += 1
                if num_lost > 1:
                    raise InputError(f"{job.name}: {reason}, with no cell under way, twice.")
            if spec["give_up"] is not None:  # it cannot even do that
                return _failures(spec, job.output)
            if is_late or is_setup:
                spec["give_up"] = {"status": status, "reason": reason}
    finally:
        spec_path.unlink(missing_ok=True)
        clear(in_flight_path)


def _failures(spec: dict[str, Any], output: Path) -> list[Point]:
    """Return the points of this job's runs that are not ok; those of an earlier job were reported by it."""
    paths = sorted((output / "records").glob(f"{spec['job']}-*.jsonl"))
    points = [record for path in paths for record in read(path) if isinstance(record, Point)]
    return [p for p in points if p.run_id in spec["run_ids"] and p.status != "ok"]


def _wait(process: WorkerProcess, deadline: float | None, stopping: threading.Event) -> tuple[int, bool]:
    """Return the exit code of the worker, and whether the deadline ended it."""
    try:
        while True:
            try:
                code: int | None = process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                code = None
            if stopping.is_set():  # what the worker has measured is on the disk already
                raise KeyboardInterrupt
            if code is not None:
                return code, False
            if deadline is not None and monotonic() >= deadline:
                process.kill()
                return process.wait(), True
    finally:
        process.kill()
        process.wait()


def _verdict(code: int, is_late: bool, timeout_s: float) -> tuple[str, str]:
    if is_late:
        return "timeout", f"the job ran longer than job_timeout_s={timeout_s:g}"
    if code == EXIT_OUT_OF_MEMORY:
        return "oom", "there was not enough memory"
    if code == -signal.SIGKILL:
        return (
            "oom",
            "the process was killed by the system (SIGKILL), which is how Linux ends a lack of memory",
        )
    if code < 0:
        return "crashed", f"the process was ended by {signal.Signals(-code).name}"
    return "crashed", f"the process ended with exit code {code}"
