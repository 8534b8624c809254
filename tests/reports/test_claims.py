"""The page of published claims: what the records hold stands there, what they lack is not measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from harness.record import Point, append
from reports.claims import CLAIMS, NOT_MEASURED, main


def rows(text: str) -> dict[str, str]:
    """claim -> what was measured."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[-1] for row in cells[1:]}


@pytest.fixture(scope="module")
def table(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = builder.write_experiment(tmp_path_factory.mktemp("claims"))
    assert main([str(folder), "--output", str(folder / "page" / "claims.md")]) == 0
    return rows((folder / "page" / "claims.md").read_text(encoding="utf-8"))


def of(table: dict[str, str], start: str) -> str:
    (found,) = (value for claim, value in table.items() if claim.startswith(start))
    return found


def test_every_claim_has_a_row(table: dict[str, str]) -> None:
    assert list(table) == [claim.says for claim in CLAIMS]


def test_what_the_records_hold_is_there(table: dict[str, str], builder: ModuleType) -> None:
    def median(arch: str) -> float:
        found = [
            p.metrics["median_ms"]
            for p in builder.latency_points(arch, run_id="x")
            if p.cell == {"phase": "prefill", "context_tokens": 4096, "batch_size": 1}
        ]
        return found[0]

    ratio = median("transformer") / median("ttt_linear")
    assert f"{ratio:.2f} times as fast at 4,096 tokens" in of(table, "TTT-Linear is ahead")
    assert "tiny: ahead from" in of(table, "TTT-Linear is ahead")
    bits = builder.bits_per_byte("ttt_mlp", 4096)
    assert f"ttt_mlp {bits:.3f} bits a byte at 4,096 tokens" in of(table, "TTT-MLP overtakes")
    assert "titans_mag" in of(table, "needle (S-NIAH") and "% at 4,096 tokens" in of(table, "needle (S-NIAH")
    assert "decode at 4,096 tokens, batch 4" in of(table, "Mamba has 4 to 5")
    assert "67% at 256 tokens" in of(table, "the first pass takes")  # 0.4 of the whole, over the rest
    assert of(table, "contexts beyond 2M") == "tiny: 4,096 tokens"


def test_what_they_lack_is_not_measured(table: dict[str, str]) -> None:
    for start in ("the dual form", "GSM8K", "perplexity of the memory alone", "Mamba's loss stops"):
        assert of(table, start) == NOT_MEASURED


def test_failures_are_no_measurements(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(point: Point) -> Point | None:
        if point.task == "latency" and point.arch == "ttt_linear":
            return builder.failed(point, "oom", "too large")
        return point

    folder = builder.write_experiment(tmp_path, archs=("transformer", "ttt_linear"), change=change)
    assert main([str(folder)]) == 0
    assert of(rows(capsys.readouterr().out), "TTT-Linear is ahead") == NOT_MEASURED


def test_no_records_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "holds no record file" in error


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
    assert "| tiny | mamba | 1 | 60% | 60% | 60% | 60% | oom | 0% | yes |" in lines
    assert any(line.startswith("| tiny | transformer | 4 | 60% |") for line in lines)
    assert "| tiny | mamba | 8,192 | 8 | 123,456 | 38% | 3.0 GiB |" in lines
    assert "| tiny | transformer | 8,192 | 8 | oom |  |  |" in lines


def test_without_ceilings_there_are_no_such_tables(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(builder.write_experiment(tmp_path, archs=("mamba",)))]) == 0
    assert "##" not in capsys.readouterr().out
