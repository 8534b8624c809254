"""Condense a measured folder to the numbers that a regression check compares, and keep them as JSON.

Which numbers these are follows from the tasks' declarations (`harness.record.metrics.Metric`). The entry of
an architecture holds
    exact:    metrics whose tolerance is 0, which only a change of code can change (parameters, state, FLOPs);
    quality:  metrics with a larger tolerance, of every cell or as the mean over the cells;
    time:     headline times and training times, divided by the time of the calibration; for information;
    cells:    the status of every cell.
A number is named by its task, its metric and its cell: "perplexity.bits_per_byte at context_tokens=512".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from harness.record.metrics import Metric
from harness.record.schema import Point, content_hash
from reports.regression.baseline_of_version_1 import migrate
from reports.results.load import ReportError, Results, is_number

BASELINE_SCHEMA_VERSION = 2
#: Unit of a time -> milliseconds.
MS_PER = {"ms": 1.0, "s": 1000.0}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The numbers of one architecture of one size and seed; see the module."""

    exact: dict[str, float] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    time: dict[str, float] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """All entries, and how much worse each quality may get.

    entries:    by "arch size seed N".
    tolerances: by "task.metric", in the metric's unit.
    """

    entries: dict[str, Entry]
    tolerances: dict[str, float]


def measure_of(name: str) -> str:
    """Return "task.metric" of a number's name: without its cell."""
    return name.split(" at ")[0]


def declared_metrics(results: Results) -> dict[str, Metric]:
    """Return what the tasks that were measured declare, by "task.metric"."""
    tasks = dict.fromkeys(point.task for point in results.points)
    return {f"{task}.{metric.name}": metric for task in tasks for metric in results.metrics(task)}


def condense(results: Results) -> Baseline:
    """Return a measured folder as a baseline with the tolerances that the tasks declare."""
    calibration = [p.metrics.get("matmul_ms") for p in results.ok("calibration")]
    known = [float(value) for value in calibration if value is not None and is_number(value) and value > 0]
    groups: dict[str, list[Point]] = {}
    for point in results.points:
        if point.arch:
            groups.setdefault(f"{point.arch} {point.size} seed {point.seed}", []).append(point)
    return Baseline(
        entries={key: _entry(groups[key], results, mean(known) if known else None) for key in sorted(groups)},
        tolerances={
            measure: metric.tolerance
            for measure, metric in declared_metrics(results).items()
            if metric.tolerance
        },
    )


def _entry(points: list[Point], results: Results, calibration_ms: float | None) -> Entry:
    entry = Entry(cells={cell_name(point.task, point.cell): point.status for point in points})
    over_cells: dict[str, list[float]] = {}
    for point in points:
        if point.status != "ok":
            continue
        for metric in results.metrics(point.task):
            measure = f"{point.task}.{metric.name}"
            for cell, value in _values(point, metric):
                name = f"{measure} at {cell}" if cell else measure
                if metric.tolerance == 0:
                    entry.exact[name] = value
                elif metric.tolerance is not None and metric.is_compared_on_mean:
                    over_cells.setdefault(measure, []).append(value)
                elif metric.tolerance is not None:
                    entry.quality[name] = value
                elif _is_compared_time(metric) and calibration_ms:
                    entry.time[name] = value * MS_PER[metric.unit] / calibration_ms
    entry.quality.update({measure: mean(values) for measure, values in over_cells.items()})
    return entry


def _values(point: Point, metric: Metric) -> Iterator[tuple[str, float]]:
    """Yield a point's numbers of a metric, each with its cell.

    There is one, or one per context where the details hold a table of them, as those of a cost card do."""
    value = point.metrics.get(metric.name)
    if value is not None and is_number(value):
        yield cell_text(point.cell), value
    by_context = point.details.get(metric.name)
    for context, number in by_context.items() if isinstance(by_context, dict) else ():
        if is_number(number):
            yield cell_text({**point.cell, "context_tokens": context}), number


def _is_compared_time(metric: Metric) -> bool:
    return (
        metric.unit in MS_PER
        and metric.direction == "lower"
        and (metric.is_headline or metric.kind == "training")
    )


def cell_text(cell: Mapping[str, Any]) -> str:
    """Return a cell's coordinates as text, in the order of their names."""
    return ", ".join(f"{name}={value}" for name, value in sorted(cell.items()))


def cell_name(task: str, cell: Mapping[str, Any]) -> str:
    """Return the name of a cell among all cells of an architecture."""
    return f"{task} {cell_text(cell)}".strip()


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline, one number per line so that a review can read its changes.

    Raises ReportError if the file cannot be written, or if the baseline holds no measurement."""
    if not any(_has_numbers(entry) for entry in baseline.entries.values()):
        raise ReportError("there is no quality and no cost among the results to make a baseline of")
    value = {"schema_version": BASELINE_SCHEMA_VERSION, **asdict(baseline)}
    value["content_hash"] = content_hash(value["entries"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"the baseline cannot be written to {path} ({error.strerror})") from error


def read_baseline(path: Path) -> Baseline:
    """Read a baseline of this schema version or an older one.

    Raises ReportError where the file is missing, damaged, edited by hand or of a newer schema."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"there is no baseline to read at {path} ({error.strerror})") from error
    except ValueError as error:
        raise ReportError(f"the baseline {path} is damaged ({error})") from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version not in (1, BASELINE_SCHEMA_VERSION):
        raise ReportError(
            f"the baseline {path} has schema version {version}, this program reads {BASELINE_SCHEMA_VERSION}"
        )
    try:
        is_whole = value["content_hash"] == content_hash(value["entries"])
        if version == 1:
            value = migrate(value)
        entries = {key: Entry(**entry) for key, entry in value["entries"].items()}
        tolerances = {str(name): float(number) for name, number in value["tolerances"].items()}
        sections = [section for entry in entries.values() for section in asdict(entry).values()]
        if not is_whole or not all(isinstance(section, dict) for section in sections):
            raise ReportError(f"the baseline {path} is damaged (its contents do not match their hash)")
        without = {
            measure_of(name) for entry in entries.values() for name in entry.quality
        } - tolerances.keys()
        if without:
            raise ReportError(
                f"the baseline {path} is damaged (no tolerance of {', '.join(sorted(without))})"
            )
    except ReportError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"the baseline {path} is damaged ({type(error).__name__}: {error})") from error
    if not any(_has_numbers(entry) for entry in entries.values()):
        raise ReportError(f"the baseline {path} holds no measurement")
    return Baseline(entries=entries, tolerances=tolerances)


def _has_numbers(entry: Entry) -> bool:
    return bool(entry.exact or entry.quality)
