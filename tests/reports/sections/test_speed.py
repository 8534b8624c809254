"""Times beside what the machine could reach, on the page of published claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from harness.record.schema import Point, append
from reports.claims.__main__ import main
from reports.results.load import load
from reports.sections.cost.speed import decode_lines


def test_times_stand_beside_their_ceilings(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(point: Point) -> Point | None:
        if point.task != "latency" or point.cell["phase"] != "decode":
            return point
        if point.arch == "mamba" and point.cell["context_tokens"] == 4096:
            return builder.failed(point, "oom", "too large")
        metrics = {**point.metrics, "floor_ms": 0.6 * point.metrics["median_ms"]}
        return replace(point, metrics=metrics, details={**point.details, "uses_decode_graph": True})

    folder = builder.write_experiment(tmp_path, archs=("transformer", "mamba"), change=change)
    speed = {"tokens_per_s": 123456.0, "utilisation": 0.38, "peak_memory_bytes": 3 * 2**30}
    cell = {"context_tokens": 8192, "batch_size": 8}
    path = folder / "records" / "latency.jsonl"
    append(path, builder.point("mamba", "training_speed", cell, run_id="run-latency", metrics=speed))
    failed = builder.point(
        "transformer", "training_speed", cell, run_id="run-latency", status="oom", reason="x"
    )
    append(path, failed)
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = "60.0% | 60.0% | 60.0% | 60.0% | oom | 50%: reached where measured"
    assert f"| tiny | mamba | 1 | {shares} | 0.0% | 5%: reached where measured | yes |" in lines
    assert any(line.startswith("| tiny | transformer | 4 | 60.0% |") for line in lines)
    assert "| tiny | mamba | 8,192 | 8 | 123,456 | 38% | 3.0 GiB |" in lines
    assert "| tiny | transformer | 8,192 | 8 | oom |  |  |" in lines


def decode_rows(builder: ModuleType, folder: Path, medians: dict[int, float], batch: int) -> list[str]:
    """The cells after those of the contexts, of Mamba's decode with a floor of 1 ms."""

    def change(point: Point) -> Point | None:
        cell = point.cell
        if point.task != "latency" or (cell["phase"], cell["batch_size"]) != ("decode", 1):
            return None
        metrics = {**point.metrics, "floor_ms": 1.0, "median_ms": medians[cell["context_tokens"]]}
        return replace(point, cell={**cell, "batch_size": batch}, metrics=metrics)

    written = builder.write_experiment(folder, archs=("mamba",), change=change)
    (row,) = (line for line in decode_lines(load([written])) if line.startswith("| tiny"))
    return [cell.strip() for cell in row.split("|")[-5:-1]]


@pytest.mark.parametrize(
    ("batch", "slowest", "asked", "spread", "flat"),
    [
        (1, 1.9, "50%: reached", "0.0%", "5%: reached"),
        (1, 1.99, "50%: reached", "4.7%", "5%: reached"),
        (1, 2.01, "50%: missed at 1,024", "5.8%", "5%: missed"),
        (64, 1.9, "60%: missed at 256, 512, 1,024, 2,048, 4,096", "0.0%", "5%: reached"),
        (4, 1.9, "", "0.0%", "5%: reached"),
    ],
)
def test_decode_is_held_to_what_is_asked(
    builder: ModuleType, tmp_path: Path, batch: int, slowest: float, asked: str, spread: str, flat: str
) -> None:
    medians = dict.fromkeys(builder.CONTEXTS, 1.9) | {1024: slowest}
    assert decode_rows(builder, tmp_path, medians, batch)[:3] == [asked, spread, flat]


def test_a_state_that_grows_is_not_asked_to_be_flat(builder: ModuleType, tmp_path: Path) -> None:
    def change(point: Point) -> Point:
        return replace(point, metrics={**point.metrics, "floor_ms": 0.1})

    folder = builder.write_experiment(tmp_path, archs=("transformer",), change=change)
    text = "\n".join(decode_lines(load([folder])))
    assert "| tiny | transformer | 1 |" in text and "5%:" not in text


def test_without_ceilings_there_are_no_such_tables(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(builder.write_experiment(tmp_path, archs=("mamba",)))]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("## ")] == ["## Published tables"]
