"""The parent's side of a job: a process of its own, its time limit, and what becomes of a death.

Nothing here imports torch: the parent stays small, and a sweep's next job always finds it alive.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from harness.record import Point, append

#: The worker's exit code for a user's mistake; its sentence is on stderr already.
EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130


class InputError(ValueError):
    """The worker refused its input and has said why."""


def run_job(spec: dict[str, Any], output: Path, timeout_s: float) -> list[Point]:
    """Runs a job to its end and returns the typed failures the parent had to write.

    A worker that dies is started again and goes on after the cell it died at. Raises InputError
    where it refuses its input, KeyboardInterrupt where it was interrupted.
    """
    folder = output / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    spec_path = folder / f"{uuid.uuid4().hex}.json"
    in_flight_path = spec_path.with_suffix(".in_flight.json")
    spec = {**spec, "in_flight_path": str(in_flight_path), "run_ids": [], "give_up": None}
    deadline = time.monotonic() + timeout_s
    failures: list[Point] = []
    try:
        while True:
            spec["run_ids"] = [*spec["run_ids"], uuid.uuid4().hex[:12]]
            spec_path.write_text(json.dumps(spec))
            in_flight_path.unlink(missing_ok=True)
            code, is_late = _wait(spec_path, None if spec["give_up"] else deadline)
            if code == 0:
                return failures
            if code == EXIT_INPUT_ERROR:
                raise InputError
            if code in (EXIT_INTERRUPTED, -signal.SIGINT):
                raise KeyboardInterrupt
            if not in_flight_path.exists():
                raise RuntimeError(f"the job's process ended with exit code {code} before it began")
            status, reason = _verdict(code, is_late, timeout_s)
            failures.append(_record_death(in_flight_path, status, reason))
            if is_late:
                spec["give_up"] = {"status": status, "reason": reason}
    finally:
        spec_path.unlink(missing_ok=True)
        in_flight_path.unlink(missing_ok=True)


def _wait(spec_path: Path, deadline: float | None) -> tuple[int, bool]:
    """Exit code of the worker, and whether the deadline ended it."""
    process = subprocess.Popen([sys.executable, "-m", "harness.worker", str(spec_path)])
    try:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        return process.wait(remaining), False
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(), True
    except KeyboardInterrupt:  # the worker got it too; it has nothing to lose but its time
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def _verdict(code: int, is_late: bool, timeout_s: float) -> tuple[str, str]:
    if is_late:
        return "timeout", f"the job ran longer than job_timeout_s={timeout_s:g}"
    if code == -signal.SIGKILL:
        return (
            "oom",
            "the process was killed by the system (SIGKILL), which is how Linux ends a lack of memory",
        )
    if code < 0:
        return "crashed", f"the process was ended by {signal.Signals(-code).name}"
    return "crashed", f"the process ended with exit code {code}"


def _record_death(in_flight_path: Path, status: str, reason: str) -> Point:
    """Turns the cell that was being measured into a typed record."""
    in_flight = json.loads(in_flight_path.read_text())
    point = Point(**in_flight["point"], status=status, reason=reason)
    append(Path(in_flight["path"]), point)
    return point
