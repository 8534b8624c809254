"""A job's record file as the worker sees it: what is there already, and what is under way."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.record import Header, Point, RecordError, append, cell_key, read

#: Outcomes that stand when the same command is run again; a crash is tried again.
FINAL_STATUSES = ("ok", "oom", "timeout", "diverged", "unsupported")


class Logbook:
    """Appends points under one header, skips cells that are done, names the one under way."""

    def __init__(
        self, path: Path, header: Header, *, in_flight_path: Path, run_ids: list[str], retry_failed: bool
    ) -> None:
        self.path, self.header, self.in_flight_path = path, header, in_flight_path
        self.num_damaged = 0
        self._done: dict[str, Point] = {}
        self._is_header_written = False
        final = ("ok",) if retry_failed else FINAL_STATUSES
        for record in read(path) if path.exists() else ():
            if isinstance(record, RecordError):
                self.num_damaged += 1
            elif isinstance(record, Point) and (record.status in final or record.run_id in run_ids):
                self._done[record.key] = record

    def done(self, arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any]) -> Point | None:
        """The cell's finished point, if there is one."""
        return self._done.get(cell_key(arch, size, seed, task, cell))

    def begin(self, arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any]) -> None:
        """Says which cell is under way, so that a death can be put down to it."""
        point = {
            "run_id": self.header.run_id,
            "arch": arch,
            "size": size,
            "seed": seed,
            "task": task,
            "cell": dict(cell),
        }
        self._write_header()
        temporary = self.in_flight_path.with_suffix(".partial")
        temporary.write_text(json.dumps({"path": str(self.path), "point": point}))
        os.replace(temporary, self.in_flight_path)

    def write(
        self, arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any], **rest: Any
    ) -> Point:
        """Appends the cell's outcome; `rest` as in Point."""
        self._write_header()
        point = Point(
            run_id=self.header.run_id, arch=arch, size=size, seed=seed, task=task, cell=dict(cell), **rest
        )
        append(self.path, point)
        self._done[point.key] = point
        return point

    def _write_header(self) -> None:
        if not self._is_header_written:
            append(self.path, self.header)
            self._is_header_written = True
