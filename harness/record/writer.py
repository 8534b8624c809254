"""A job's record file as the worker sees it: what is there already, and what is under way.

The file IN_FLIGHT names the cell under way, so that the parent can put a death down to it. It is
there from the worker's first moment, for training, with the header that is not yet written; it is
taken away when the cell is done.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.record.schema import Header, Point, RecordError, append, cell_key, read

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
        data_hashes: dict[str, str | None] = {}
        for record in read(path) if path.exists() else ():
            if isinstance(record, RecordError):
                self.num_damaged += 1
            elif isinstance(record, Header):
                data_hashes[record.run_id] = record.data_hash
            elif not self._is_same_data(data_hashes.get(record.run_id)):
                continue
            elif record.status in final or record.run_id in run_ids:
                self._done[record.key] = record

    def _is_same_data(self, data_hash: str | None) -> bool:
        """What was measured on other data, under the same name, is measured again."""
        return data_hash is None or self.header.data_hash in (None, data_hash)

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
        write_in_flight(self.in_flight_path, path=self.path, header=None, point=point)

    def write(
        self, arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any], **rest: Any
    ) -> Point:
        """Appends the cell's outcome; `rest` as in Point."""
        self._write_header()
        point = Point(
            run_id=self.header.run_id, arch=arch, size=size, seed=seed, task=task, cell=dict(cell), **rest
        )
        append(self.path, point)
        self.in_flight_path.unlink(missing_ok=True)
        self._done[point.key] = point
        return point

    def _write_header(self) -> None:
        if not self._is_header_written:
            append(self.path, self.header)
            self._is_header_written = True


def write_in_flight(
    in_flight_path: Path, *, path: Path, header: Header | None, point: dict[str, Any]
) -> None:
    """Names the cell under way; `header` where the record file has not got it yet."""
    value = {
        "path": str(path),
        "header": None if header is None else dataclasses.asdict(header),
        "point": point,
    }
    temporary = in_flight_path.with_suffix(".partial")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, in_flight_path)
