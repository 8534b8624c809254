"""Writes the points of one job, and knows which of its cells are measured already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.record import in_flight
from harness.record.identity import is_same
from harness.record.in_flight import InFlight
from harness.record.schema import Header, Point, RecordError, append, cell_key, read

#: Outcomes that stand when the same command is run again; a crash is tried again.
FINAL_STATUSES = ("ok", "oom", "timeout", "diverged", "unsupported")


class RecordWriter:
    """Appends points under one header, skips cells that are measured and names the cell under way.

    path:           the record file of the job.
    header:         of this run; it is written before the first point. Its identities say which earlier points
                    count, and its declarations which metrics may be written.
    in_flight_path: of the note that names the cell under way.
    run_ids:        attempts of this run: their points count whatever their outcome.
    retry_failed:   only cells with a number count as measured.
    num_damaged:    lines of the job's record files that could not be read.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        *,
        in_flight_path: Path,
        run_ids: list[str],
        retry_failed: bool,
    ) -> None:
        self.path, self.header, self.in_flight_path = path, header, in_flight_path
        self.num_damaged = 0
        self._done: dict[str, list[Point]] = defaultdict(list)
        self._is_header_written = False
        final = ("ok",) if retry_failed else FINAL_STATUSES
        last: Header | None = None
        for record in (record for file in in_flight.files_of(path) for record in read(file)):
            if isinstance(record, RecordError):
                self.num_damaged += 1
            elif isinstance(record, Header):
                last = record
            elif record.status in final or record.run_id in run_ids:
                self._done[record.key].append(record)
        if last is not None and last.identities != header.identities:
            self._write_header()  # a report shows the configuration that was asked for last

    def done(self, arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any]) -> Point | None:
        """Return the cell's finished point, or None."""
        identity = self._identity(arch, task)
        points = self._done.get(cell_key(arch, size, seed, task, cell), [])
        return next((point for point in reversed(points) if is_same(point.identity, identity)), None)

    def begin(self, arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any]) -> None:
        """Name the cell under way, so that a death of the process is recorded as its outcome."""
        self._write_header()
        point = self._point(arch, size, seed, task, cell)
        InFlight(record_path=self.path, point=point, header=None).write(self.in_flight_path)

    def write(
        self, arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any], **outcome: Any
    ) -> Point:
        """Append the cell's outcome, fields of Point, and return its point.

        Raises ValueError where a metric is not declared."""
        point = self._point(arch, size, seed, task, cell, **outcome)
        check_declared(self.header, point)
        self._write_header()
        append(self.path, point)
        in_flight.clear(self.in_flight_path)
        self._done[point.key].append(point)
        return point

    def _point(
        self, arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any], **outcome: Any
    ) -> Point:
        return Point(
            run_id=self.header.run_id,
            arch=arch,
            size=size,
            seed=seed,
            task=task,
            cell=dict(cell),
            identity=self._identity(arch, task),
            **outcome,
        )

    def _identity(self, arch: str, task: str) -> str:
        return self.header.identities[arch][task]

    def _write_header(self) -> None:
        if not self._is_header_written:
            append(self.path, self.header)
            self._is_header_written = True


def check_declared(header: Header, point: Point) -> None:
    """Raise ValueError where the header does not declare a metric of the point."""
    declared = {metric.name for metric in header.metrics.get(point.task, ())}
    missing = sorted(point.metrics.keys() - declared)
    if missing:
        raise ValueError(
            f"task={point.task} writes {', '.join(missing)}, which its METRICS do not declare; declare name, "
            "unit, direction and kind there."
        )
