"""Read the record files of one or more experiment folders and pick what a report shows.

Three rules, in this order:
1. Points of one (architecture, size, seed) and one family of identities (`harness.record.identity`) are never
   mixed where their identities differ: the model, or settings of a task, that a run was last about are shown,
   the others are counted. A run that finds everything measured is about it too. What is measured without an
   architecture, such as a comparison of kernels, has settings of its own in every cell.
2. A cell measured several times under one identity shows the newest run's measurement.
3. A line that cannot be read is counted and named, never fatal.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

import pandas as pd

from harness.record.identity import UNKNOWN_DATA, family, settings, subject
from harness.record.metrics import Metric
from harness.record.schema import Header, Point, RecordError, read
from reports.results.series import Series, make_series

INDEX = ["arch", "size"]


class ReportError(ValueError):
    """Nothing can be reported; the message is one sentence."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The points that a report shows, and how many it leaves out.

    headers:          the runs that contributed a shown point, oldest first.
    series:           one entry per (architecture, size), by name.
    points:           the shown points, failures included.
    damaged_lines:    one sentence per line that could not be read.
    num_superseded:   older measurements of shown cells.
    left_out:         "architecture, size, seed" -> points of other configurations.
    """

    folders: list[Path]
    headers: list[Header]
    series: list[Series]
    points: list[Point]
    damaged_lines: list[str] = field(default_factory=list)
    num_superseded: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def metrics(self, task: str) -> tuple[Metric, ...]:
        """Return what the task declares of its numbers, as the newest header that names it says."""
        return next((h.metrics[task] for h in reversed(self.headers) if task in h.metrics), ())

    def of(self, task: str, series: Series | None = None) -> list[Point]:
        """Return the shown points of a task, whatever their status; those of one series where it is given."""
        return [
            point
            for point in self.points
            if point.task == task and (series is None or (point.arch, point.size) == series.key)
        ]

    def ok(self, task: str) -> list[Point]:
        """Return the measured points of a task."""
        return [point for point in self.of(task) if point.status == "ok"]

    def failures(self) -> list[Point]:
        """Return everything that was tried and gave no number."""
        return [point for point in self.points if point.status != "ok"]

    def table(self, task: str) -> pd.DataFrame:
        """Return one row per (architecture, size, cell) of a task: the cell's coordinates, each metric's mean
        over the seeds that have it, its sample standard deviation as `<metric>_sd` (missing for one seed),
        and num_seeds. The table is empty where nothing was measured."""
        return aggregate(self.ok(task))

    def samples(self, series: Series, task: str) -> list[Point]:
        """Return the measured points of one series, for their raw samples and details."""
        return [point for point in self.of(task, series) if point.status == "ok"]


def aggregate(points: Iterable[Point]) -> pd.DataFrame:
    """Return the table that `Results.table` describes."""
    rows: list[dict[str, Any]] = []
    cell_columns: list[str] = []
    for point in points:
        cell = {name: _coordinate(value) for name, value in point.cell.items()}
        cell_columns += [name for name in cell if name not in cell_columns]
        metrics = {name: float(value) for name, value in point.metrics.items() if is_number(value)}
        rows.append({**metrics, **cell, "arch": point.arch, "size": point.size, "seed": point.seed})
    if not rows:
        return pd.DataFrame(columns=[*INDEX, "num_seeds"])
    frame = pd.DataFrame(rows)
    keys = INDEX + cell_columns
    metrics_columns = [name for name in frame.columns if name not in [*keys, "seed"]]
    groups = frame.groupby(keys, dropna=False, sort=False)
    result = groups[metrics_columns].mean() if metrics_columns else pd.DataFrame(index=groups.size().index)
    if metrics_columns:
        result = result.join(groups[metrics_columns].std(ddof=1).add_suffix("_sd"))
    result["num_seeds"] = groups["seed"].nunique()
    return result.reset_index()


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite int or float; False for bool and None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value == value and abs(value) != float("inf")


def load(folders: list[Path]) -> Results:
    """Read `<folder>/records/*.jsonl` of every folder.

    Raises ReportError where a folder has no record file, or no file holds a point that can be shown."""
    headers: dict[str, Header] = {}
    points: list[Point] = []
    damaged: list[str] = []
    for path in _record_files(folders):
        for record in _read_file(path):
            if isinstance(record, Header):
                headers[record.run_id] = record
            elif isinstance(record, Point):
                points.append(record)
            else:
                damaged.append(str(record))
    if all(point.task == "calibration" for point in points):  # alone it is a yardstick without a use
        where = ", ".join(str(folder) for folder in folders)
        extra = f" ({len(damaged)} damaged lines)" if damaged else ""
        raise ReportError(f"no usable measurement in the record files of {where}{extra}")
    shown, num_superseded, left_out = _select(points, headers)
    used = {point.run_id for point in shown}
    used_headers = sorted((h for h in headers.values() if h.run_id in used), key=_started)
    return Results(
        folders=list(folders),
        headers=used_headers,
        series=make_series(shown, headers),
        points=shown,
        damaged_lines=damaged,
        num_superseded=num_superseded,
        left_out=left_out,
    )


def _record_files(folders: list[Path]) -> list[Path]:
    files = []
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"there is no folder {folder}")
        found = sorted((folder / "records").glob("*.jsonl"))
        if not found:
            raise ReportError(f"{folder} holds no record file (looked for records/*.jsonl)")
        files += found
    return files


def _read_file(path: Path) -> Iterable[Header | Point | RecordError]:
    """Yield records as `harness.record.schema.read` does, with the types checked that a report relies on."""
    try:
        for record in read(path):
            fault = _fault(record)
            yield RecordError(f"{path}: a record whose {fault}") if fault else record
    except OSError as error:
        yield RecordError(f"{path} cannot be read ({error.strerror})")


def _fault(record: Header | Point | RecordError) -> str | None:
    if isinstance(record, Point):
        kinds: dict[str, type] = {
            "cell": dict,
            "metrics": dict,
            "samples": dict,
            "details": dict,
            "arch": str,
            "size": str,
        }
        kinds |= {"identity": str, "task": str, "run_id": str, "seed": int}
    elif isinstance(record, Header):
        kinds = {"config": dict, "environment": dict, "run_id": str, "started_at": str, "config_hash": str}
    else:
        return None
    for name, kind in kinds.items():
        if not isinstance(getattr(record, name), kind):
            return f"{name} is not a {kind.__name__}"
    return None


def _select(points: list[Point], headers: dict[str, Header]) -> tuple[list[Point], int, dict[str, int]]:
    """Apply rules 1 and 2. Later in the files counts as newer where times are equal."""
    ranks = [(_started(headers.get(point.run_id)), index) for index, point in enumerate(points)]
    groups = [_group(point) for point in points]
    subjects = _subjects(points, groups)
    mentions = list(_mentions(headers))
    newest_subjects = _newest(
        zip(groups, subjects, ranks, strict=True),
        ((group, subject(identity), rank) for group, _, identity, rank in mentions),
    )
    is_shown = [found == newest_subjects[group] for group, found in zip(groups, subjects, strict=True)]
    tasks = [
        (group, point.task if point.arch else point.key) for group, point in zip(groups, points, strict=True)
    ]
    newest_settings = _newest(
        (
            (task, settings(point.identity), rank)
            for task, point, rank, shown in zip(tasks, points, ranks, is_shown, strict=True)
            if shown
        ),
        (
            ((group, task), settings(identity), rank)
            for group, task, identity, rank in mentions
            if subject(identity) == newest_subjects.get(group)
        ),
    )
    left_out: dict[str, int] = defaultdict(int)
    newest: dict[str, int] = {}
    num_candidates = 0
    for index, point in enumerate(points):
        if not is_shown[index] or settings(point.identity) != newest_settings[tasks[index]]:
            left_out[f"{point.arch or point.task}, {point.size}, seed {point.seed}"] += 1
            continue
        num_candidates += 1
        if point.key not in newest or ranks[index] > ranks[newest[point.key]]:
            newest[point.key] = index
    shown = [points[index] for index in sorted(newest.values())]
    return shown, num_candidates - len(shown), dict(left_out)


#: Architecture, size, seed and family of identity: points of one are never shown with different subjects.
Group = tuple[str, str, int, str]
Rank = tuple[datetime, int]


def _group(point: Point) -> Group:
    return point.arch, point.size, point.seed, family(point.identity)


def _subjects(points: list[Point], groups: list[Group]) -> list[tuple[str, str]]:
    """Return each point's subject; one that ended before its data were known belongs to any data."""
    found = [subject(point.identity) for point in points]
    known = {
        (group, hashed): data
        for group, (hashed, data) in zip(groups, found, strict=True)
        if data != UNKNOWN_DATA
    }
    return [
        (hashed, known.get((group, hashed), data)) if data == UNKNOWN_DATA else (hashed, data)
        for group, (hashed, data) in zip(groups, found, strict=True)
    ]


def _mentions(headers: dict[str, Header]) -> Iterator[tuple[Group, str, str, Rank]]:
    """Yield group, task, identity and rank of what each run was about, measured by it or before it."""
    for index, header in enumerate(headers.values()):
        size, seed = (header.config.get("size") or {}).get("name", ""), header.config.get("seed", 0)
        for arch, identities in header.identities.items():
            for task, identity in identities.items():
                yield (arch, size, seed, family(identity)), task, identity, (_started(header), index)


def _newest(
    measured: Iterable[tuple[Any, Any, Rank]], mentioned: Iterable[tuple[Any, Any, Rank]]
) -> dict[Any, Any]:
    """Return the newest value of each group among those that are measured; a later run that is about the same
    value makes it newer."""
    latest: dict[tuple[Any, Any], Rank] = {}
    for group, value, rank in measured:
        latest[group, value] = max(rank, latest.get((group, value), rank))
    for group, value, rank in mentioned:
        if (group, value) in latest and rank[0] > latest[group, value][0]:
            latest[group, value] = rank
    newest: dict[Any, tuple[Rank, Any]] = {}
    for (group, value), rank in latest.items():
        if group not in newest or rank > newest[group][0]:
            newest[group] = (rank, value)
    return {group: value for group, (_, value) in newest.items()}


def _started(header: Header | None) -> datetime:
    oldest = datetime.min.replace(tzinfo=UTC)
    if header is None:
        return oldest
    try:
        time = datetime.fromisoformat(header.started_at)
    except ValueError:
        return oldest
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _coordinate(value: Any) -> Any:
    """Return a cell's coordinate in a form that can be grouped by."""
    return value if isinstance(value, (int, float, str, bool)) or value is None else json.dumps(value)
