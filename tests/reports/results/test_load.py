"""Which records a report shows, and what it says about the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness.record.identity import timed_identity
from harness.record.schema import Point, append
from reports.results.load import ReportError, load


def only(task: str, **metrics: float) -> Callable[[Point], Point | None]:
    """A change that keeps one task's points and sets some of their metrics."""

    def change(point: Point) -> Point | None:
        return replace(point, metrics={**point.metrics, **metrics}) if point.task == task else None

    return change


def train_value(folders: list[Path], name: str = "tokens_per_s") -> float:
    table = load(folders).table("train")
    assert len(table) == 1
    return float(table[name].iloc[0])


def test_the_newest_run_of_a_cell_wins_whatever_the_order_of_the_files(
    builder: ModuleType, tmp_path: Path
) -> None:
    for name, started_at, value in (
        ("a", "2026-03-01T00:00:00Z", 2.0),
        ("b", "2026-02-01T00:00:00+00:00", 1.0),
    ):
        builder.write_experiment(
            tmp_path / name,
            archs=("mamba",),
            change=only("train", tokens_per_s=value),
            tag=name,
            started_at=started_at,
        )
    for folders in ([tmp_path / "a", tmp_path / "b"], [tmp_path / "b", tmp_path / "a"]):
        assert train_value(folders) == 2.0
        assert load(folders).num_superseded == 1


def test_a_later_line_wins_where_the_times_are_equal(builder: ModuleType, tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        builder.write_experiment(
            tmp_path, archs=("mamba",), change=only("train", tokens_per_s=value), tag=str(value)
        )
    assert train_value([tmp_path]) == 2.0


def test_configurations_are_never_mixed(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(tmp_path, archs=("mamba", "hybrid"), subject="old")
    builder.write_experiment(
        tmp_path,
        archs=("mamba",),
        change=only("train", tokens_per_s=7.0),
        tag="new",
        subject="new",
        started_at="2026-05-01T00:00:00Z",
    )
    results = load([tmp_path])
    num_old = len(
        [point for point in builder.quality_points("mamba", run_id="x") if point.task not in builder.FAMILIES]
    )
    assert [p.metrics["tokens_per_s"] for p in results.ok("train") if p.arch == "mamba"] == [7.0]
    assert not [point for point in results.of("needle") if point.arch == "mamba"]
    assert [point for point in results.of("needle") if point.arch == "hybrid"]
    assert results.left_out == {"mamba, tiny, seed 0": num_old}


def test_a_run_that_went_on_adds_to_what_was_there(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(tmp_path, archs=("mamba",), change=only("train"))
    builder.write_experiment(
        tmp_path, archs=("mamba",), change=only("needle"), tag="resumed", started_at="2026-01-02T00:00:00Z"
    )
    results = load([tmp_path])
    assert len(results.of("train")) == 1 and len(results.of("needle")) == 25
    assert (results.num_superseded, results.left_out) == (0, {})


def test_seeds_become_a_mean_and_a_spread(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(tmp_path, archs=("mamba",), seeds=(0, 1, 2))
    row = load([tmp_path]).table("perplexity").set_index("context_tokens").loc[512]
    assert row["num_seeds"] == 3
    assert row["bits_per_byte"] == pytest.approx(builder.bits_per_byte("mamba", 512) + 0.01)
    assert row["bits_per_byte_sd"] == pytest.approx(0.01)


def test_damaged_lines_are_counted_and_hide_nothing(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(tmp_path, archs=("mamba",))
    num_points = len(load([tmp_path]).points)
    path = tmp_path / "records" / "mamba-tiny-seed0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    broken = [
        b"\xff\xfe\x00\n",
        b'{"kind": "point"}\n',
        b"[1, 2]\n",
        b'{"kind":"point","schema_version":99}\n',
    ]
    path.write_bytes(b"".join([*lines[:3], *broken, *lines[3:]]))
    results = load([tmp_path])
    assert len(results.points) == num_points
    assert len(results.damaged_lines) == 4


def test_a_point_whose_metrics_are_no_mapping_is_a_damaged_line(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(tmp_path, archs=("mamba",))
    point = builder.point("mamba", "train", {}, run_id="run-mamba-0", metrics=[1])
    append(tmp_path / "records" / "other.jsonl", point)
    results = load([tmp_path])
    assert len(results.damaged_lines) == 1 and "metrics" in results.damaged_lines[0]


def test_points_without_their_header_are_kept(builder: ModuleType, tmp_path: Path) -> None:
    for point in builder.quality_points("mamba", run_id="lost"):
        append(tmp_path / "records" / "lost.jsonl", point)
    results = load([tmp_path])
    assert [series.label for series in results.series] == ["mamba"]
    assert len(results.of("needle")) == 25


@pytest.mark.parametrize("content", [None, "", "nonsense\n"])
def test_no_usable_record_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "records").mkdir()
        (tmp_path / "records" / "a.jsonl").write_text(content)
    with pytest.raises(ReportError) as caught:
        load([tmp_path])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_share_a_colour_and_differ_in_name_and_line(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(tmp_path, archs=("mamba", "hybrid"))
    builder.write_experiment(
        tmp_path, archs=("mamba",), change=lambda point: replace(point, size="small"), tag="small"
    )
    series = {entry.key: entry for entry in load([tmp_path]).series}
    tiny, small = series["mamba", "tiny"], series["mamba", "small"]
    assert (tiny.label, small.label) == ("Mamba (tiny)", "Mamba (small)")
    assert tiny.colour == small.colour != series["hybrid", "tiny"].colour
    assert tiny.line_style != small.line_style


def test_an_unusable_colour_is_replaced(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(
        tmp_path, archs=("mamba",), config={"arch": {"name": "mamba", "colour": "no colour"}}
    )
    (entry,) = load([tmp_path]).series
    assert entry.colour == "#1f77b4"  # the latency points name it too


def test_a_calibration_alone_is_no_result(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(
        tmp_path, archs=("mamba",), change=lambda point: point if point.task == "calibration" else None
    )
    with pytest.raises(ReportError, match="no usable measurement"):
        load([tmp_path])


def test_parts_of_a_latency_job_merge_and_other_settings_do_not(builder: ModuleType, tmp_path: Path) -> None:
    """Two parts with other neighbours, lengths and hashes; and an older one with other samples."""

    def part(name: str, context: int, others: list[str], started: str, **settings: Any) -> None:
        archs = [{"name": arch, "display_name": arch, "colour": "#000000"} for arch in ("mamba", *others)]
        tasks = {"latency": {"context_lengths_tokens": [context], "num_samples": 5, **settings}}
        config = {"seed": 0, "tasks": tasks, "arch": archs[0], "interleaved": archs[1:], "dtype": "bfloat16"}
        header = builder.header(None, run_id=name, config=config, started_at=started)
        kept = {"num_samples": 5, **settings}
        identity = timed_identity(config, archs[0], "latency", kept, environment=header.environment)
        cell = {"phase": "decode", "context_tokens": context, "batch_size": 1}
        path = tmp_path / "records" / f"{name}.jsonl"
        append(path, header)
        append(path, builder.point("mamba", "latency", cell, run_id=name, identity=identity))

    part("old", 512, [], "2026-01-01T10:00:00+00:00", max_cell_s=1)
    part("first", 1024, ["mamba2"], "2026-01-02T10:00:00+00:00")
    part("second", 2048, ["recurrent", "hybrid"], "2026-01-03T10:00:00+00:00")
    results = load([tmp_path])
    assert sorted(p.cell["context_tokens"] for p in results.of("latency")) == [1024, 2048]
    assert results.left_out == {"mamba, tiny, seed 0": 1}


def test_the_model_that_was_asked_for_last_is_shown_though_nothing_was_measured_anew(
    builder: ModuleType, tmp_path: Path
) -> None:
    """A run that finds everything measured writes a header that says what it was about."""
    runs = (("first", 1.0, "2026-01-01T00:00:00Z"), ("second", 2.0, "2026-01-02T00:00:00Z"))
    for subject, value, started_at in runs:
        builder.write_experiment(
            tmp_path,
            archs=("mamba",),
            change=only("train", tokens_per_s=value),
            tag=subject,
            subject=subject,
            started_at=started_at,
        )
    assert train_value([tmp_path]) == 2.0
    again = builder.header(
        "mamba",
        run_id="again",
        config={"size": {"name": "tiny"}, "seed": 0},
        started_at="2026-01-03T00:00:00Z",
        identities={"mamba": {"train": "model:first:data123:-"}},
    )
    append(tmp_path / "records" / "mamba-tiny-seed0.jsonl", again)
    assert train_value([tmp_path]) == 1.0
    assert load([tmp_path]).left_out == {"mamba, tiny, seed 0": 1}


def test_a_failure_before_the_data_were_read_stands_beside_what_was_measured(
    builder: ModuleType, tmp_path: Path
) -> None:
    builder.write_experiment(tmp_path, archs=("mamba",), change=only("needle"))
    append(tmp_path / "records" / "b.jsonl", builder.header("mamba", run_id="b"))
    failed = builder.failed(builder.point("mamba", "train", {}, run_id="b"), "oom", "too large")
    append(tmp_path / "records" / "b.jsonl", replace(failed, identity="model:same:?:-"))
    results = load([tmp_path])
    assert len(results.of("needle")) == 25 and [p.status for p in results.of("train")] == ["oom"]
    assert results.left_out == {}
