"""What a regression check compares: a measured folder boiled down to one JSON value.

An architecture's entry holds
    exact:    numbers that a change of code alone can change (parameters, state bytes, FLOPs);
    quality:  numbers with a tolerance, lower or higher being better;
    time:     times as ratios to the calibration, for information;
    cells:    the status of every cell.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from harness.record.schema import Point, content_hash
from reports.results.load import ReportError, Results, is_number

BASELINE_SCHEMA_VERSION = 1

#: The quality measures: how much worse each may get. Wide enough for another processor's rounding in
#: a short training run, far narrower than a bug. A baseline states its own, which rule.
DEFAULT_TOLERANCES = {
    "final_validation_bits_per_byte": 0.05,
    "bits_per_byte": 0.05,
    "answer_log_probability_nats": 0.3,
}
#: The measures among them of which more is better.
HIGHER_IS_BETTER = frozenset({"answer_log_probability_nats"})


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One architecture of one size and seed; see the module."""

    exact: dict[str, float] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    time: dict[str, float] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """All entries, by "arch size seed", and how much worse each quality measure may get."""

    entries: dict[str, Entry]
    tolerances: dict[str, float]


def measure_of(name: str) -> str:
    """The measure behind a quality's name: bits_per_byte of "bits_per_byte at 512"."""
    return name.split(" at ")[0]


def condense(results: Results) -> Baseline:
    """A measured folder as a baseline with the default tolerances."""
    calibration = [p.metrics.get("matmul_ms") for p in results.ok("calibration")]
    known = [float(value) for value in calibration if value is not None and is_number(value) and value > 0]
    groups: dict[str, list[Point]] = {}
    for point in results.points:
        if point.arch:
            groups.setdefault(f"{point.arch} {point.size} seed {point.seed}", []).append(point)
    return Baseline(
        entries={key: _entry(groups[key], mean(known) if known else None) for key in sorted(groups)},
        tolerances=dict(DEFAULT_TOLERANCES),
    )


def _entry(points: list[Point], calibration_ms: float | None) -> Entry:
    entry = Entry(cells={_cell_name(point): point.status for point in points})
    needle: list[float] = []
    for point in points:
        if point.status != "ok":
            continue
        if point.task == "cost":
            entry.exact.update(_exact(point))
        elif point.task == "train":
            _put(entry.quality, "final_validation_bits_per_byte", point, "final_validation_bits_per_byte")
            seconds = point.metrics.get("train_seconds")
            time_ms = 1000 * seconds if seconds is not None and is_number(seconds) else None
            _put_ratio(entry.time, "training", time_ms, calibration_ms)
        elif point.task == "perplexity":
            name = f"bits_per_byte at {point.cell.get('context_tokens')}"
            _put(entry.quality, name, point, "bits_per_byte")
        elif point.task == "needle":
            value = point.metrics.get("answer_log_probability_nats")
            needle += [float(value)] if value is not None and is_number(value) else []
        elif point.task == "latency":
            _put_ratio(entry.time, _cell_name(point), point.metrics.get("median_ms"), calibration_ms)
    if needle:
        entry.quality["answer_log_probability_nats"] = mean(needle)
    return entry


def _exact(point: Point) -> dict[str, float]:
    found: dict[str, float] = {}
    _put(found, "num_parameters", point, "num_parameters")
    for name in ("state_bytes", "prefill_flops_per_token", "decode_flops_per_token"):
        values = point.details.get(name)
        for context, value in values.items() if isinstance(values, dict) else ():
            if is_number(value):
                found[f"{name} at {context}"] = value
    return found


def _put(target: dict[str, float], name: str, point: Point, metric: str) -> None:
    """Copies a metric where it is a number."""
    value = point.metrics.get(metric)
    if value is not None and is_number(value):
        target[name] = value


def _put_ratio(
    target: dict[str, float], name: str, time_ms: float | None, calibration_ms: float | None
) -> None:
    """A time over the calibration's, where both are known."""
    if time_ms is not None and is_number(time_ms) and calibration_ms:
        target[name] = time_ms / calibration_ms


def _cell_name(point: Point) -> str:
    cell = ", ".join(f"{name}={value}" for name, value in sorted(point.cell.items()))
    return f"{point.task} {cell}".strip()


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Writes a baseline, readable line by line in a review. Raises ReportError if it cannot, or if
    the baseline holds no measurement."""
    if not any(_numbers(entry) for entry in baseline.entries.values()):
        raise ReportError("there is no quality and no cost among the results to make a baseline of")
    value = {"schema_version": BASELINE_SCHEMA_VERSION, **asdict(baseline)}
    value["content_hash"] = content_hash(value["entries"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"the baseline cannot be written to {path} ({error.strerror})") from error


def read_baseline(path: Path) -> Baseline:
    """Raises ReportError where the file is missing, damaged, edited by hand or of another schema."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"there is no baseline to read at {path} ({error.strerror})") from error
    except ValueError as error:
        raise ReportError(f"the baseline {path} is damaged ({error})") from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != BASELINE_SCHEMA_VERSION:
        raise ReportError(
            f"the baseline {path} has schema version {version}, this program reads {BASELINE_SCHEMA_VERSION}"
        )
    try:
        entries = {key: Entry(**entry) for key, entry in value["entries"].items()}
        tolerances = {name: float(value["tolerances"][name]) for name in DEFAULT_TOLERANCES}
        is_whole = value["content_hash"] == content_hash(value["entries"])
        sections = [section for entry in entries.values() for section in asdict(entry).values()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"the baseline {path} is damaged ({type(error).__name__}: {error})") from error
    if not is_whole or not all(isinstance(section, dict) for section in sections):
        raise ReportError(f"the baseline {path} is damaged (its contents do not match their hash)")
    if not entries or not any(_numbers(entry) for entry in entries.values()):
        raise ReportError(f"the baseline {path} holds no measurement")
    return Baseline(entries=entries, tolerances=tolerances)


def _numbers(entry: Entry) -> Iterable[float]:
    return [*entry.exact.values(), *entry.quality.values()]
