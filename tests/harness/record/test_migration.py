"""Records of version 1 load for good, and mean what they meant.

The files are lines of published runs, as version 1 wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.record.identity import family, subject, trained_identity
from harness.record.migration import Version1
from harness.record.schema import SCHEMA_VERSION, Header, Point, read
from reports.results.load import load
from tests.conftest import compose_resolved

FOLDER = Path(__file__).resolve().parents[2] / "goldens" / "records_v1"
FILES = sorted(FOLDER.glob("*.jsonl"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_field_is_kept(path: Path) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    records = list(read(path))
    assert len(records) == len(lines) > 1
    for line, record in zip(lines, records, strict=True):
        assert line["schema_version"] == 1 and isinstance(record, (Header, Point))
        assert record.schema_version == SCHEMA_VERSION
        del line["schema_version"]
        assert {name: getattr(record, name) for name in line} == line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_is_declared(path: Path) -> None:
    header, *points = list(read(path))
    assert isinstance(header, Header)
    for point in points:
        assert isinstance(point, Point)
        assert point.metrics.keys() <= {metric.name for metric in header.metrics[point.task]}


def test_what_was_measured_on_one_model_belongs_together_and_the_rest_stands_apart() -> None:
    families: dict[str, set[str]] = {}
    subjects: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for path in FILES:
        for record in read(path):
            if isinstance(record, Point):
                families.setdefault(record.task, set()).add(family(record.identity))
                subjects.setdefault((record.arch, family(record.identity)), set()).add(
                    subject(record.identity)
                )
    assert families == {
        "train": {"model"},
        "perplexity": {"model"},
        "needle": {"model"},
        "cost": {"cost"},
        "latency": {"latency"},
        "calibration": {"calibration"},
        "learning_rate_search": {"learning_rate_search"},
    }
    assert {len(found) for found in subjects.values()} == {1}


def test_a_report_shows_them_all(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "records")
    results = load([tmp_path])
    num_points = sum(len(path.read_text().splitlines()) - 1 for path in FILES)
    assert (len(results.points), results.left_out, results.num_superseded) == (num_points, {}, 0)
    assert {series.arch for series in results.series} == {"mamba", "transformer"}
    assert [metric.name for metric in results.metrics("perplexity") if metric.is_headline] == [
        "bits_per_byte"
    ]


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "later.jsonl"
    path.write_text('{"kind": "point", "schema_version": 3}\n')
    (error,) = read(path)
    assert "schema version 3" in str(error) and "line 1" in str(error)


def test_the_experts_of_version_1_are_todays_by_another_name() -> None:
    config = compose_resolved("arch=transformer_squared")
    arch = dict(config["arch"])
    today = trained_identity(config, arch, None, device="cpu", data="text")
    groups = arch.pop("post_training")
    del groups["_target_"]
    arch["expert_training"] = {
        name: {key: value for key, value in group.items() if key != "_target_"}
        if isinstance(group, dict) and name != "prompts"
        else group
        for name, group in groups.items()
    }
    header = {"run_id": "r", "config": {**config, "arch": arch}, "environment": {"device": "cpu"}}
    migration = Version1()
    migration.header({**header, "data_hash": "text"})
    point = migration.point({"run_id": "r", "arch": "transformer_squared", "task": "train"})
    assert point["identity"] == today
