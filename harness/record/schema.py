"""The result schema: JSON lines in append-only files. Standard library only.

Each run, an attempt at a job, writes a header and then one point per measured cell, with the raw samples.
Files are append-only, so that results of several machines merge by copying. Missing is null, never 0; what
could not be measured is a point whose status says so. Records of an older version are migrated on reading.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.record.identity import content_hash as content_hash
from harness.record.metrics import Metric, from_plain
from harness.record.migration import Version1

SCHEMA_VERSION = 2

#: ok, or why there is no number.
STATUSES = ("ok", "oom", "timeout", "diverged", "crashed", "unsupported")


class RecordError(ValueError):
    """A line that is no record; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """One run of one job.

    job:             a readable name, unique in the experiment's folder, e.g. "mamba-tiny-seed0".
    experiment:      the experiment's name, or null.
    config:          the resolved configuration, in full.
    config_hash:     short name of the configuration, without where and how the job runs.
    command:         the command line that reproduces the run.
    environment:     see harness.record.environment.
    data_hash:       content hash of corpus and tokenizer, null where the job reads no data.
    started_at:      UTC, ISO 8601.
    metrics:         task -> what it declares of its numbers.
    identities:      architecture -> task -> identity of the results that the run is about, those included
                     that an earlier run has measured.
    """

    run_id: str
    job: str
    experiment: str | None
    config: dict[str, Any]
    config_hash: str
    command: str
    environment: dict[str, Any]
    data_hash: str | None
    started_at: str
    metrics: Mapping[str, tuple[Metric, ...]] = field(default_factory=dict)
    identities: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    kind: str = "header"
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured cell of one architecture.

    arch:            the name in conf/arch.
    task:            "train", "perplexity", "needle", "latency", "cost", ...
    cell:            the coordinates within the task, e.g. {"context_tokens": 512, "depth": 0.5}.
    identity:        what the numbers depend on besides the above, see harness.record.identity; "" where it is
                     not known.
    status, reason:  one of STATUSES, and a sentence where it is not ok.
    metrics:         name -> number or null, units last in the name; documented by each task.
    samples:         name -> raw samples the metrics were computed from.
    details:         anything else worth keeping (strings, lists), e.g. implementation names.
    """

    run_id: str
    arch: str
    size: str
    seed: int
    task: str
    cell: dict[str, Any]
    identity: str = ""
    status: str = "ok"
    reason: str | None = None
    metrics: dict[str, float | int | None] = field(default_factory=dict)
    samples: dict[str, list[Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    kind: str = "point"
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status!r} must be one of {', '.join(STATUSES)}")

    @property
    def key(self) -> str:
        """Architecture, size, seed, task and cell, as a string."""
        return cell_key(self.arch, self.size, self.seed, self.task, self.cell)


def cell_key(arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any]) -> str:
    """Return the coordinates of a cell, as a string."""
    return json.dumps([arch, size, seed, task, cell], sort_keys=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: both become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def append(path: Path, record: Header | Point) -> None:
    """Append one line in one write, and flush it to the disk; create the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_finite(dataclasses.asdict(record)), separators=(",", ":"), allow_nan=False)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # jobs of several configurations may share a file
        is_cut = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        prefix = b"\n" if is_cut else b""  # a line cut short by a kill stays a line of its own
        file.write(prefix + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[Header | Point | RecordError]:
    """Yield the records of a file in order.

    A damaged line is yielded as a RecordError, not raised, so that one bad line never hides the others."""
    version_1 = Version1()
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield parse(json.loads(line), version_1)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                yield RecordError(f"{path}, line {number}: not a record ({error})")


def parse(value: dict[str, Any], version_1: Version1 | None = None) -> Header | Point:
    """Return the record that a line's JSON value holds.

    version_1: migrates the values of that version; None where there are none.
    Raises ValueError, TypeError, KeyError or AttributeError where it is no record."""
    kind, version = value["kind"], value["schema_version"]
    if version != SCHEMA_VERSION and (version != 1 or version_1 is None):
        raise ValueError(f"schema version {version}, this program reads {SCHEMA_VERSION} and older ones")
    if kind == "point":
        if version_1 is not None and version == 1:
            value = version_1.point(value)
        return Point(**{**value, "schema_version": SCHEMA_VERSION})
    if kind != "header":
        raise ValueError(f"kind {kind!r}")
    if version_1 is not None and version == 1:
        value = version_1.header(value)
    else:
        value["metrics"] = {task: from_plain(metrics) for task, metrics in value["metrics"].items()}
    return Header(**{**value, "schema_version": SCHEMA_VERSION})
