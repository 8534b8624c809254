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
from pathlib import Path
from time import monotonic
from typing import Any

from harness.record.in_flight import InFlight, clear
from harness.record.schema import Point, read

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


class InputError(ValueError):
    """The job cannot be done. Without a message, the worker has said why."""


def run_job(
    spec: dict[str, Any],
    output: Path,
    timeout_s: float,
    *,
    line: int,
    stopping: threading.Event,
    give_up: dict[str, str] | None = None,
) -> list[Point]:
    """Runs a job to its end and returns its typed failures, whoever wrote them.

    line:     of its progress bar, from 0 down.
    stopping: ends the worker when it is set, and this with a KeyboardInterrupt.
    give_up:  status and reason to record for every cell that is not measured; None: measure them.

    A worker that dies is started again and goes on after the cell it died at; one that is late, or
    that died before its first cell, is started once more to give up the cells that are left. Raises
    InputError where it refuses its input, KeyboardInterrupt where the user interrupts.
    """
    folder = output / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    spec_path = folder / f"{uuid.uuid4().hex}.json"
    in_flight_path = spec_path.with_suffix(".in_flight.json")
    spec = {
        **spec,
        "parent_pid": os.getpid(),
        "in_flight_path": str(in_flight_path),
        "run_ids": [],
        "give_up": give_up,
    }
    deadline = monotonic() + timeout_s
    num_lost = 0
    try:
        while True:
            spec["run_ids"] = [*spec["run_ids"], uuid.uuid4().hex[:12]]
            spec_path.write_text(json.dumps(spec))
            clear(in_flight_path)
            code, is_late = _wait(spec_path, None if spec["give_up"] else deadline, line, stopping)
            if code == 0:
                return _failures(spec, output)
            if code == EXIT_INPUT_ERROR:
                raise InputError
            status, reason = _verdict(code, is_late, timeout_s)
            num_beside = spec["configs"][0]["num_workers"] - 1
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
                    raise InputError(f"{spec['job']}: {reason}, with no cell under way, twice.")
            if spec["give_up"] is not None:  # it cannot even do that
                return _failures(spec, output)
            if is_late or is_setup:
                spec["give_up"] = {"status": status, "reason": reason}
    finally:
        spec_path.unlink(missing_ok=True)
        clear(in_flight_path)


def _failures(spec: dict[str, Any], output: Path) -> list[Point]:
    """The points of this job's runs that are not ok; an earlier job's are its own to report."""
    paths = sorted((output / "records").glob(f"{spec['job']}-*.jsonl"))
    points = [record for path in paths for record in read(path) if isinstance(record, Point)]
    return [p for p in points if p.run_id in spec["run_ids"] and p.status != "ok"]


def _wait(spec_path: Path, deadline: float | None, line: int, stopping: threading.Event) -> tuple[int, bool]:
    """Exit code of the worker, and whether the deadline ended it."""
    process = _start(spec_path, line)
    try:
        while True:
            try:
                code = process.wait(POLL_S)
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


def _start(spec_path: Path, line: int) -> subprocess.Popen[bytes]:
    """The worker, which inherits that Ctrl-C is held back: it is the parent's to handle."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "harness.run.worker", str(spec_path)],
            env=ALLOCATOR | os.environ | {"TQDM_POSITION": str(line)},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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
