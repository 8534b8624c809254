"""The parent's side of a job: a process of its own, its time limit, and what becomes of a death.

Nothing here imports torch: the parent stays small, and a sweep's next job always finds it alive.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from harness.record import Header, Point, append, read

#: The worker's exit codes. For a user's mistake its sentence is on stderr already.
EXIT_CRASHED = 1
EXIT_INPUT_ERROR = 2
EXIT_OUT_OF_MEMORY = 3
EXIT_INTERRUPTED = 130

#: Has glibc's allocator keep up to 1 GiB of freed memory for the next operation. By default large tensors
#: go back to the system and are asked for again, page by page, which took up to a fifth of a training step.
#: What the user has set wins, and the records' header says what it was; other C libraries read neither.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


#: The workers at work. One that is no longer here, and has not ended, was stopped on purpose.
_running: set[subprocess.Popen] = set()


class InputError(ValueError):
    """The job cannot be done. Without a message, the worker has said why."""


def stop() -> None:
    """Ends every worker, from any thread: their run_job raises KeyboardInterrupt."""
    for process in list(_running):
        _running.discard(process)
        process.kill()


def run_job(spec: dict[str, Any], output: Path, timeout_s: float, line: int = 0) -> list[Point]:
    """Runs a job to its end and returns its typed failures, whoever wrote them. Its progress bar is on line
    `line`, from 0, below the cursor.

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
        "give_up": None,
    }
    deadline = time.monotonic() + timeout_s
    num_lost = 0
    try:
        while True:
            spec["run_ids"] = [*spec["run_ids"], uuid.uuid4().hex[:12]]
            spec_path.write_text(json.dumps(spec))
            in_flight_path.unlink(missing_ok=True)
            code, is_late = _wait(spec_path, None if spec["give_up"] else deadline, line)
            if code == 0:
                return _failures(spec, output)
            if code == EXIT_INPUT_ERROR:
                raise InputError
            status, reason = _verdict(code, is_late, timeout_s)
            is_setup = False
            if in_flight_path.exists():
                is_setup = _record_death(in_flight_path, status, reason)
            elif not is_late:  # before it began, or between two cells
                num_lost += 1
                if num_lost > 1:
                    raise InputError(f"{spec['job']}: {reason}, with no cell under way, twice.")
            if spec["give_up"] is not None:  # it cannot even do that
                return _failures(spec, output)
            if is_late or is_setup:
                spec["give_up"] = {"status": status, "reason": reason}
    finally:
        spec_path.unlink(missing_ok=True)
        in_flight_path.unlink(missing_ok=True)


def _failures(spec: dict[str, Any], output: Path) -> list[Point]:
    """The points of this job's runs that are not ok; an earlier job's are its own to report."""
    paths = sorted((output / "records").glob(f"{spec['job']}-*{spec['config_hash']}*.jsonl"))
    points = [record for path in paths for record in read(path) if isinstance(record, Point)]
    return [p for p in points if p.run_id in spec["run_ids"] and p.status != "ok"]


def _wait(spec_path: Path, deadline: float | None, line: int = 0) -> tuple[int, bool]:
    """Exit code of the worker, and whether the deadline ended it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.worker", str(spec_path)],
        env=ALLOCATOR | os.environ | {"TQDM_POSITION": str(line)},
        preexec_fn=_ignore_interrupt,
    )
    _running.add(process)
    try:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        code = process.wait(remaining)
        if process not in _running:
            raise KeyboardInterrupt
        return code, False
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(), True
    except KeyboardInterrupt:  # what the worker has measured is on the disk already
        process.kill()
        process.wait()
        raise
    finally:
        _running.discard(process)


def _ignore_interrupt() -> None:
    """Ctrl-C is the parent's to handle: a worker would end in a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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


def _record_death(in_flight_path: Path, status: str, reason: str) -> bool:
    """Turns the cell that was being measured into a typed record; true where the worker had not come
    to its first cell, and so had not written its header either."""
    in_flight = json.loads(in_flight_path.read_text())
    point = Point(**in_flight["point"], status=status, reason=reason)
    if in_flight["header"] is not None:
        append(Path(in_flight["path"]), Header(**in_flight["header"]))
    append(Path(in_flight["path"]), point)
    return in_flight["header"] is not None
