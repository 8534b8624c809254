"""Times beside what the machine could reach, on the page and beside the published claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from harness.record.schema import Point, append
from reports.claims.__main__ import main
from reports.page.html import render
from reports.results.load import load
from reports.sections.cost.speed import decode_table
from reports.sections.training.training_speed import training_speed_table


@pytest.fixture
def folder(builder: ModuleType, tmp_path: Path) -> Path:
    """Decode at 60% of the bound, one cell out of memory; one training step timed, one out of memory."""

    def change(point: Point) -> Point | None:
        if point.task != "latency" or point.cell["phase"] != "decode":
            return None
        if point.arch == "mamba" and point.cell["context_tokens"] == 4096:
            return builder.failed(point, "oom", "too large")
        metrics = {**point.metrics, "floor_ms": 0.6 * point.metrics["median_ms"]}
        return replace(point, metrics=metrics, details={**point.details, "uses_decode_graph": True})

    folder = builder.write_experiment(tmp_path / "measured", archs=("transformer", "mamba"), change=change)
    speed = {"median_ms": 530.9, "p10_ms": 500.0, "p90_ms": 600.0, "tokens_per_s": 123456.0}
    speed |= {"utilisation": 0.38, "peak_memory_bytes": 3 * 2**30, "first_call_ms": 1000.0}
    cell = {"context_tokens": 8192, "batch_size": 8}
    for arch, fields in (
        ("mamba", {"metrics": speed}),
        ("transformer", {"status": "oom", "reason": "too large"}),
    ):
        point = builder.point(arch, "training_speed", cell, run_id="run-latency", **fields)
        append(folder / "records" / "latency.jsonl", point)
    return folder


def test_times_stand_beside_the_machines_limits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = "60.0% | 60.0% | 60.0% | 60.0% | out of memory | 50%: reached where measured"
    assert f"| Mamba | 1 | {shares} | 0.0% | 5%: reached where measured | yes |" in lines
    assert any(line.startswith("| Transformer | 4 | 60.0% |") for line in lines)
    step = "531 [500, 600] | 123,456 | 38% | 3 GiB | 1,000"
    assert f"| 8,192 | 8 | Mamba | {step} |" in lines
    assert "| 8,192 | 8 | Transformer | out of memory | – | – | – | – |" in lines
    text = render([folder], tmp_path / "page").read_text()
    for words in ('id="decode-bound"', 'id="training-speed"', ">60.0%<", ">123,456<", ">38%<"):
        assert words in text


def decode_row(builder: ModuleType, folder: Path, medians: dict[int, float], batch: int) -> list[str]:
    """Return the cells after those of the contexts, of Mamba's decode with a bound of 1 ms."""

    def change(point: Point) -> Point | None:
        cell = point.cell
        if point.task != "latency" or (cell["phase"], cell["batch_size"]) != ("decode", 1):
            return None
        metrics = {**point.metrics, "floor_ms": 1.0, "median_ms": medians[cell["context_tokens"]]}
        return replace(point, cell={**cell, "batch_size": batch}, metrics=metrics)

    written = builder.write_experiment(folder, archs=("mamba",), change=change)
    table = decode_table(load([written]))
    assert table is not None
    (row,) = table.rows
    return [cell.text for cell in row[-4:]]


@pytest.mark.parametrize(
    ("batch", "slowest", "share", "spread", "flat"),
    [
        (1, 1.9, "50%: reached", "0.0%", "5%: reached"),
        (1, 1.99, "50%: reached", "4.7%", "5%: reached"),
        (1, 2.01, "50%: missed at 1,024", "5.8%", "5%: missed"),
        (64, 1.9, "60%: missed at 256, 512, 1,024, 2,048, 4,096", "0.0%", "5%: reached"),
        (4, 1.9, "", "0.0%", "5%: reached"),
    ],
)
def test_decode_is_held_to_its_targets(
    builder: ModuleType, tmp_path: Path, batch: int, slowest: float, share: str, spread: str, flat: str
) -> None:
    medians = dict.fromkeys(builder.CONTEXTS, 1.9) | {1024: slowest}
    assert decode_row(builder, tmp_path, medians, batch)[:3] == [share, spread, flat]


def test_a_state_that_grows_need_not_be_flat(builder: ModuleType, tmp_path: Path) -> None:
    def change(point: Point) -> Point:
        return replace(point, metrics={**point.metrics, "floor_ms": 0.1})

    table = decode_table(load([builder.write_experiment(tmp_path, archs=("transformer",), change=change)]))
    assert table is not None and [row[1].text for row in table.rows] == ["1", "4"]
    assert all(row[-2].text == "" and row[-3].text != "" for row in table.rows)


def test_without_a_bound_there_are_no_such_tables(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = builder.write_experiment(tmp_path, archs=("mamba",))
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("## ")] == ["## Published tables"]
    results = load([folder])
    assert decode_table(results) is None and training_speed_table(results) is None
