"""The note that names the cell under way. Standard library only.

The worker writes it before each cell and clears it when the cell is recorded. If the worker dies, its parent
reads the note and records the death as the outcome of that cell.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from harness.record.identity import is_same
from harness.record.schema import Header, Point, append, parse, read


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """The cell under way.

    record_path: the record file of the job.
    point:       the cell's point, still without an outcome.
    header:      the run's header where the record file does not have it yet, else None.
    """

    record_path: Path
    point: Point
    header: Header | None

    def write(self, path: Path) -> None:
        """Replace the note at `path`, all at once."""
        value = {
            "record_path": str(self.record_path),
            "point": dataclasses.asdict(self.point),
            "header": None if self.header is None else dataclasses.asdict(self.header),
        }
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(value))
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> InFlight:
        """Read the note at `path`."""
        value = json.loads(path.read_text())
        point, header = parse(value["point"]), None if value["header"] is None else parse(value["header"])
        assert isinstance(point, Point) and (header is None or isinstance(header, Header))
        return cls(record_path=Path(value["record_path"]), point=point, header=header)

    def is_measured(self) -> bool:
        """Return whether an earlier run has measured the cell, where the worker died before it had looked."""
        if self.header is None:  # the worker looked and found nothing
            return False
        records = (record for path in files_of(self.record_path) for record in read(path))
        return any(
            isinstance(record, Point)
            and record.status == "ok"
            and record.key == self.point.key
            and is_same(record.identity, self.point.identity)
            for record in records
        )

    def record(self, status: str, reason: str) -> None:
        """Append the cell's outcome to the record file, after the header if that is missing."""
        if self.header is not None:
            append(self.record_path, self.header)
        append(self.record_path, dataclasses.replace(self.point, status=status, reason=reason))


def clear(path: Path) -> None:
    """Remove the note at `path`, if there is one."""
    path.unlink(missing_ok=True)


def files_of(record_path: Path) -> list[Path]:
    """Return the record files of a job on one kind of machine, with those that were copied in beside it."""
    return sorted(record_path.parent.glob(f"{record_path.stem}*.jsonl"))
