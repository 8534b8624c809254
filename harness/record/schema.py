"""The result schema: JSON lines, one file a job. Standard library only.

A file holds one header line a run (an attempt at the job) and then one line a measured point,
with the run's id and the raw samples. Files are append-only, so results of several machines merge
by copying. Missing is null, never 0; what could not be measured is a point whose status says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1

#: ok, or why there is no number.
STATUSES = ("ok", "oom", "timeout", "diverged", "crashed", "unsupported")


class RecordError(ValueError):
    """A record file that cannot be read; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """One run of one job.

    job:             a readable name, unique in the experiment's folder, e.g. "mamba-tiny-seed0".
    experiment:      the experiment's name, or null.
    config:          the resolved configuration, in full.
    config_hash:     of what decides the numbers (model, data, training, seed); see harness.config.build.
    command:         the command line that reproduces the run.
    environment:     see harness.record.environment.
    data_hash:       content hash of corpus and tokenizer, null where the job reads no data.
    started_at:      UTC, ISO 8601.
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
    kind: str = "header"
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured cell of one architecture.

    arch:            the name in conf/arch.
    task:            "train", "perplexity", "needle", "latency", "cost", ...
    cell:            the coordinates within the task, e.g. {"context_tokens": 512, "depth": 0.5}.
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
        """What makes the point this point and no other, as a string."""
        return cell_key(self.arch, self.size, self.seed, self.task, self.cell)


def cell_key(arch: str, size: str, seed: int, task: str, cell: Mapping[str, Any]) -> str:
    """The identity of a cell, as a string."""
    return json.dumps([arch, size, seed, task, cell], sort_keys=True)


def content_hash(value: Any, length: int = 12) -> str:
    """A short hexadecimal SHA-256 of a JSON value, the same whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


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
    """Appends one line in one write, and flushes it to the disk; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_finite(dataclasses.asdict(record)), separators=(",", ":"), allow_nan=False)
    prefix = b""
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:  # a line cut short by a kill stays a line of its own
            file.seek(-1, os.SEEK_END)
            prefix = b"" if file.read(1) == b"\n" else b"\n"
    with path.open("ab") as file:
        file.write(prefix + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[Header | Point | RecordError]:
    """The records of a file in order; a damaged line is yielded as a RecordError, not raised, so
    that one bad line never hides the others."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _parse(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                yield RecordError(f"{path}, line {number}: not a record ({error})")


def _parse(value: dict[str, Any]) -> Header | Point:
    if value["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {value['schema_version']}, this program reads {SCHEMA_VERSION}")
    types = {"header": Header, "point": Point}
    if value["kind"] not in types:
        raise ValueError(f"kind {value['kind']!r}")
    return types[value["kind"]](**value)
