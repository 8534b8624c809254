"""The record file: append-only lines that survive a kill, a null where there is no number."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from harness.record.schema import Header, Point, RecordError, append, cell_key, content_hash, read


def point(**changes: object) -> Point:
    fields = {
        "run_id": "r",
        "arch": "mamba",
        "size": "tiny",
        "seed": 0,
        "task": "needle",
        "cell": {"depth": 0.5},
    }
    return Point(**{**fields, **changes})  # type: ignore[arg-type]


def header() -> Header:
    return Header(
        run_id="r",
        job="mamba-tiny-seed0",
        experiment=None,
        config={"size": {"name": "tiny"}},
        config_hash="abc",
        command="python -m harness",
        environment={"torch": "2"},
        data_hash=None,
        started_at="2026-01-01T00:00:00+00:00",
    )


def test_what_is_written_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "job.jsonl"
    written = [
        header(),
        point(metrics={"accuracy": 0.25}, samples={"hits": [1, 0]}),
        point(status="oom", reason="x"),
    ]
    for record in written:
        append(path, record)
    assert list(read(path)) == written


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    append(path, point(metrics={"a": math.nan, "b": math.inf, "c": None}, samples={"t": [1.0, -math.inf]}))
    (found,) = read(path)
    assert isinstance(found, Point)
    assert found.metrics == {"a": None, "b": None, "c": None} and found.samples == {"t": [1.0, None]}
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_a_line_cut_short_stays_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    append(path, header())
    with path.open("a") as file:
        file.write('{"kind":"point","run')
    append(path, point())
    first, cut, last = read(path)
    assert first == header() and last == point()
    assert isinstance(cut, RecordError) and "line 2" in str(cut) and str(path) in str(cut)


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        "7",
        "{}",
        '{"kind": "point", "schema_version": 1}',
        json.dumps({**dataclasses.asdict(point()), "schema_version": 3}),
        json.dumps({**dataclasses.asdict(point()), "kind": "rumour"}),
        json.dumps({**dataclasses.asdict(point()), "status": "fine"}),
        json.dumps({**dataclasses.asdict(point()), "extra": 1}),
        "\ufffd\ufffd",
    ],
)
def test_a_damaged_line_hides_no_other(line: str, tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    append(path, header())
    with path.open("a") as file:
        file.write(line + "\n")
    append(path, point())
    first, damaged, last = read(path)
    assert first == header() and last == point()
    assert isinstance(damaged, RecordError) and "line 2" in str(damaged)


def test_bytes_that_are_not_text_hide_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    append(path, header())
    with path.open("ab") as file:
        file.write(b"\xff\xfe\x00\n")
    append(path, point())
    assert [isinstance(record, RecordError) for record in read(path)] == [False, True, False]


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match="status='fine' must be one of ok, oom"):
        point(status="fine")


def test_the_key_is_the_cell_and_not_the_run() -> None:
    assert point().key == point(run_id="other", metrics={"a": 1}).key
    assert point().key != point(cell={"depth": 1.0}).key
    assert cell_key("a", "b", 0, "t", {"x": 1, "y": 2}) == cell_key("a", "b", 0, "t", {"y": 2, "x": 1})


def test_a_content_hash_does_not_depend_on_order_and_is_stable() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2}) != content_hash({"a": "2"})
    assert content_hash({"a": 1}) == "015abd7f5cc5"
