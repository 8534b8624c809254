"""`python -m reports.regression.compare FOLDER BASELINE [--renew]`: check whether anything got worse.

A quality may get worse by its tolerance in the baseline, or by the one its task declares where the baseline
has none. Numbers of the cost card must be equal. A cell that had a number must have one. Times are shown as
ratios to the calibration and never fail. Exit status 0: nothing got worse; 1: something did; 2: nothing could
be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from harness.record.metrics import Metric
from reports.regression.baseline import (
    Baseline,
    Entry,
    condense,
    declared_metrics,
    measure_of,
    read_baseline,
    write_baseline,
)
from reports.results.load import ReportError, load

OK, WORSE, CANNOT_COMPARE = 0, 1, 2
#: A time whose ratio changes by more than this factor is worth a line.
TIME_FACTOR = 1.25


@dataclass(frozen=True, kw_only=True)
class Change:
    """A difference between the baseline and the results.

    verdict: "worse" and "differs" (of numbers that must be equal) fail the check; "improved", "new",
    "changed" (a cell that fails in another way than before), "slower" and "faster" do not."""

    entry: str
    what: str
    before: str
    now: str
    verdict: str

    @property
    def is_failure(self) -> bool:
        """True where the check fails because of this change."""
        return self.verdict in ("worse", "differs")


def compare(baseline: Baseline, current: Baseline, metrics: Mapping[str, Metric]) -> list[Change]:
    """Return all differences, failures first.

    metrics: what the tasks of the results declare, by "task.metric".
    Raises ReportError if the two have no measurement in common."""
    if not any(_have_shared(entry, current.entries.get(key)) for key, entry in baseline.entries.items()):
        raise ReportError("the results and the baseline have no measurement in common")
    tolerances = {**current.tolerances, **baseline.tolerances}
    changes: list[Change] = []
    for key, before in baseline.entries.items():
        now = current.entries.get(key)
        if now is None:
            changes.append(
                Change(entry=key, what="all cells", before="measured", now="missing", verdict="worse")
            )
            continue
        changes += _cells(key, before, now)
        changes += _exact(key, before, now)
        changes += _quality(key, before, now, tolerances, metrics)
        changes += _times(key, before, now)
    for key in current.entries:
        if key not in baseline.entries:
            changes.append(
                Change(entry=key, what="all cells", before="not there", now="there", verdict="new")
            )
    order = ("worse", "differs", "improved", "changed", "new", "slower", "faster")
    return sorted(changes, key=lambda change: (order.index(change.verdict), change.entry))


def _have_shared(before: Entry, now: Entry | None) -> bool:
    return now is not None and bool(
        before.exact.keys() & now.exact.keys() or before.quality.keys() & now.quality.keys()
    )


def _cells(key: str, before: Entry, now: Entry) -> list[Change]:
    changes = []
    for cell, status in before.cells.items():
        new_status = now.cells.get(cell, "missing")
        if new_status != status:
            verdict = "worse" if status == "ok" or new_status == "missing" else "improved"
            if status != "ok" and new_status not in ("ok", "missing"):
                verdict = "changed"
            changes.append(Change(entry=key, what=cell, before=status, now=new_status, verdict=verdict))
    for cell, status in now.cells.items():
        if cell not in before.cells:
            changes.append(Change(entry=key, what=cell, before="not there", now=status, verdict="new"))
    return changes


def _exact(key: str, before: Entry, now: Entry) -> list[Change]:
    changes = []
    for name in dict.fromkeys([*before.exact, *now.exact]):
        old, new = before.exact.get(name), now.exact.get(name)
        if old != new:
            verdict = "differs" if old is not None else "new"
            changes.append(Change(entry=key, what=name, before=_text(old), now=_text(new), verdict=verdict))
    return changes


def _quality(
    key: str, before: Entry, now: Entry, tolerances: Mapping[str, float], metrics: Mapping[str, Metric]
) -> list[Change]:
    changes = []
    for name in dict.fromkeys([*before.quality, *now.quality]):
        old, new = before.quality.get(name), now.quality.get(name)
        measure = measure_of(name)
        if old is None or new is None:
            verdict = "new" if old is None else "worse"
        elif abs(new - old) <= tolerances[measure]:
            continue
        elif metrics[measure].direction == "neither":
            verdict = "differs"
        else:
            verdict = "improved" if (new > old) == metrics[measure].is_better_higher else "worse"
        changes.append(Change(entry=key, what=name, before=_text(old), now=_text(new), verdict=verdict))
    return changes


def _times(key: str, before: Entry, now: Entry) -> list[Change]:
    changes = []
    for name, old in before.time.items():
        new = now.time.get(name)
        if new is None or old <= 0 or new <= 0 or 1 / TIME_FACTOR <= new / old <= TIME_FACTOR:
            continue
        verdict = "slower" if new > old else "faster"
        what = f"{name} (× calibration)"
        changes.append(Change(entry=key, what=what, before=_text(old), now=_text(new), verdict=verdict))
    return changes


def _text(value: float | None) -> str:
    if value is None:
        return "missing"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def table_text(changes: list[Change]) -> str:
    """Return the changes as a table for a terminal or a log."""
    rows = [("architecture", "what", "baseline", "now", "verdict")]
    rows += [(change.entry, change.what, change.before, change.now, change.verdict) for change in changes]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    rows.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """Compare or renew, and return the exit status; see the module."""
    parser = argparse.ArgumentParser(prog="python -m reports.regression.compare", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="holds records/*.jsonl")
    parser.add_argument("baseline", metavar="BASELINE", type=Path, help="a JSON file")
    parser.add_argument("--renew", action="store_true", help="write the baseline from FOLDER instead")
    options = parser.parse_args(arguments)
    try:
        return _run(options.folder, options.baseline, options.renew)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return CANNOT_COMPARE


def _renew(renewed: Baseline, path: Path) -> int:
    """Write the renewed baseline; tolerances that the old one states are kept."""
    if path.exists():
        try:
            old = read_baseline(path).tolerances
            tolerances = {name: old.get(name, declared) for name, declared in renewed.tolerances.items()}
            renewed = replace(renewed, tolerances=tolerances)
        except ReportError as error:
            print(f"The old baseline's tolerances are lost, the default ones hold: {error}")
    write_baseline(path, renewed)
    print(f"{path} now holds {len(renewed.entries)} architectures.")
    return OK


def _run(folder: Path, path: Path, is_renewal: bool) -> int:
    results = load([folder])
    current = condense(results)
    if is_renewal:
        return _renew(current, path)
    baseline = read_baseline(path)
    changes = compare(baseline, current, declared_metrics(results))
    if results.damaged_lines:
        print(f"{len(results.damaged_lines)} record lines could not be read: {results.damaged_lines[0]}")
    for name in sorted(baseline.tolerances.keys() - current.tolerances.keys()):
        print(f"The baseline's tolerance of {name} is not used: no task here declares one for it.")
    num_failures = sum(change.is_failure for change in changes)
    print(table_text(changes) if changes else "Nothing changed.")
    limits = ", ".join(
        f"{name} {baseline.tolerances.get(name, declared):g}" for name, declared in current.tolerances.items()
    )
    print(f"{num_failures} worse of {len(changes)} changes; tolerances: {limits}; times never fail.")
    return WORSE if num_failures else OK


if __name__ == "__main__":
    sys.exit(main())
