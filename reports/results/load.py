"""Reads the record files of one or more experiment folders and picks what a report shows.

Three rules, in this order:
1. Runs of the same (architecture, size, seed) with different configuration hashes are never mixed:
   the newest configuration is shown, the others are counted. Model, search, latency and calibration
   jobs are configured apart, so this holds for each of those families on its own. Parts of a latency
   job that measure other cells, or beside other architectures, are one configuration: they merge.
2. A cell measured several times under one configuration shows the newest run's measurement.
3. A line that cannot be read is counted and named, never fatal.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

import pandas as pd

from harness.record.metrics import Metric
from harness.record.schema import Header, Point, RecordError, content_hash, read
from reports.results.series import Series, make_series

#: Tasks run by jobs of their own, with configurations of their own.
SEPARATE_TASKS = ("latency", "training_speed", "learning_rate_search", "calibration")
#: Those whose job measures several architectures in turn.
INTERLEAVED_TASKS = ("latency", "training_speed")
#: What chooses their cells, and no number; and what else of a configuration decides a time.
CELL_KEYS = ("context_lengths_tokens", "batch_sizes", "phases", "batch_tokens")
TIMED_KEYS = ("size", "seed", "device", "dtype", "num_threads", "match", "reference", "implementation")
INDEX = ["arch", "size"]


class ReportError(ValueError):
    """Nothing can be reported; the message is one sentence."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a report shows, and how much it leaves out.

    headers:          the runs that contributed a shown point, oldest first.
    series:           one entry an (architecture, size), by name.
    points:           the shown points, failures included.
    damaged_lines:    one sentence a line that could not be read.
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

    def of(self, task: str) -> list[Point]:
        """All shown points of a task, whatever their status."""
        return [point for point in self.points if point.task == task]

    def ok(self, task: str) -> list[Point]:
        """The measured points of a task."""
        return [point for point in self.of(task) if point.status == "ok"]

    def failures(self) -> list[Point]:
        """Everything that was tried and gave no number."""
        return [point for point in self.points if point.status != "ok"]

    def table(self, task: str) -> pd.DataFrame:
        """One row an (architecture, size, cell) of a task: the cell's coordinates, each metric's
        mean over the seeds that have it, its sample standard deviation as `<metric>_sd` (missing
        for one seed), and num_seeds. Empty where nothing was measured."""
        return aggregate(self.ok(task))

    def samples(self, series: Series, task: str) -> list[Point]:
        """The measured points of one architecture, for their raw samples and details."""
        return [point for point in self.ok(task) if (point.arch, point.size) == series.key]


def aggregate(points: Iterable[Point]) -> pd.DataFrame:
    """See `Results.table`."""
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
    """True for finite int and float; False for bool, None and everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value == value and abs(value) != float("inf")


def load(folders: list[Path]) -> Results:
    """Reads `<folder>/records/*.jsonl` of every folder.

    Raises ReportError if a folder has no record file, or if no file holds a usable point."""
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
    if not any(point.arch for point in points):  # a calibration alone says nothing of an architecture
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
    """As `harness.record.schema.read`, with the field types checked that a report relies on."""
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
        kinds |= {"task": str, "run_id": str, "seed": int}
    elif isinstance(record, Header):
        kinds = {"config": dict, "environment": dict, "run_id": str, "started_at": str, "config_hash": str}
    else:
        return None
    for name, kind in kinds.items():
        if not isinstance(getattr(record, name), kind):
            return f"{name} is not a {kind.__name__}"
    return None


def _select(points: list[Point], headers: dict[str, Header]) -> tuple[list[Point], int, dict[str, int]]:
    """Applies rules 1 and 2. Later in the files counts as newer where times are equal."""
    ranks = [(_started(headers.get(point.run_id)), index) for index, point in enumerate(points)]
    hashes = [_configuration(p, headers[p.run_id]) if p.run_id in headers else "" for p in points]
    newest_hash: dict[tuple[str, str, int, str], tuple[tuple[datetime, int], str]] = {}
    for point, rank, config_hash in zip(points, ranks, hashes, strict=True):
        group = _group(point)
        if group not in newest_hash or rank > newest_hash[group][0]:
            newest_hash[group] = (rank, config_hash)
    left_out: dict[str, int] = defaultdict(int)
    newest: dict[str, int] = {}
    num_candidates = 0
    for index, point in enumerate(points):
        if hashes[index] != newest_hash[_group(point)][1]:
            left_out[f"{point.arch or point.task}, {point.size}, seed {point.seed}"] += 1
            continue
        num_candidates += 1
        if point.key not in newest or ranks[index] > ranks[newest[point.key]]:
            newest[point.key] = index
    shown = [points[index] for index in sorted(newest.values())]
    return shown, num_candidates - len(shown), dict(left_out)


def _configuration(point: Point, header: Header) -> str:
    """What may not differ between points that are shown together."""
    config = header.config
    settings = (config.get("tasks") or {}).get(point.task)
    if point.task not in INTERLEAVED_TASKS or not isinstance(settings, dict):
        return header.config_hash
    others = config.get("interleaved") or []
    own = [arch for arch in (config.get("arch"), *others) if arch and arch.get("name") == point.arch]
    kept = {key: value for key, value in settings.items() if key not in CELL_KEYS}
    return content_hash([own, kept, {key: config.get(key) for key in TIMED_KEYS}])


def _group(point: Point) -> tuple[str, str, int, str]:
    family = point.task if point.task in SEPARATE_TASKS else "model"
    return (point.arch, point.size, point.seed, family)


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
    """Cell coordinates must be hashable to be grouped by."""
    return value if isinstance(value, (int, float, str, bool)) or value is None else json.dumps(value)
