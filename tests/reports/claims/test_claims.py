"""The page of published claims: what the records hold stands there, what they lack is not measured."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from harness.peers.cases import LINES
from harness.record.schema import Point, append
from reports.claims.__main__ import NOT_MEASURED, main
from reports.claims.ledger import CLAIMS, TABLES

REPOSITORY = Path(__file__).resolve().parents[3]


def rows(text: str) -> dict[str, str]:
    """claim -> what was measured."""
    lines = text.split("## Published tables")[0].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[-1] for row in cells[1:]}


def published(text: str, title: str) -> dict[str, list[str]]:
    """name of a row of a published table -> its cells, those of the head under ""."""
    (part,) = (part for part in text.split("\n### ") if part.startswith(title))
    head, _, *cells = ([c.strip() for c in ln.split("|")[1:-1]] for ln in part.splitlines() if ln[:1] == "|")
    return {"": head[1:], **{row[0]: row[1:] for row in cells}}


@pytest.fixture(scope="module")
def text(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = builder.write_experiment(tmp_path_factory.mktemp("claims"))
    assert main([str(folder), "--output", str(folder / "page" / "claims.md")]) == 0
    return (folder / "page" / "claims.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table(text: str) -> dict[str, str]:
    return rows(text)


def of(table: dict[str, str], start: str) -> str:
    (found,) = (value for claim, value in table.items() if claim.startswith(start))
    return found


def test_every_claim_has_a_row(table: dict[str, str]) -> None:
    assert list(table) == [claim.says for claim in CLAIMS]


def test_figures_of_the_papers_are_quoted(text: str, table: dict[str, str]) -> None:
    """A few of every table, typed from the papers by hand."""
    assert published(text, "From linear attention")["+ mini-batches of 16"] == ["12.35"]
    assert published(text, "Titans and its baselines")["MAC"][:3] == ["25.43", "28.13", "47.36"]
    assert published(text, "Titans and its baselines")["MAC"][3:6] == ["19.93", "20.12", "52.51"]
    assert published(text, "A needle in a haystack")["Mamba-2"][0] == "98.6 / 61.4 / 31.0 / 5.4"
    assert published(text, "Titans' memory with one")["no decay"][:3] == ["29.04", "45.11", "85.60"]
    assert sum("GSM8K 75.89 → 79.15 (77.18)" in says for says in table) == 1


def test_our_architectures_stand_in_the_rows_of_their_namesakes() -> None:
    (table,) = (table for table in TABLES if table.title.startswith("Titans and its baselines"))
    assert {name: arch for name, arch, _ in table.rows} == {
        "Transformer++": "transformer",
        "Mamba": "mamba",
        "Mamba-2": "mamba2",
        "TTT": "ttt_linear",
        "LMM": "titans_lmm",
        "MAC": "titans_mac",
        "MAG": "titans_mag",
        "MAL": "titans_mal",
    }
    files = (REPOSITORY / "conf" / "arch").rglob("*.yaml")
    known = {name for path in files for name in re.findall(r"^name: (\w+)$", path.read_text(), re.MULTILINE)}
    assert {arch for table in TABLES for _, arch, _ in table.rows if arch is not None} <= known


def test_every_figure_says_where_it_is_from_and_at_what_scale(text: str) -> None:
    for claim in CLAIMS:
        assert claim.paper.startswith("arXiv ") and claim.scale
        assert (claim.measure is None) == claim.ours.startswith("none: ")
    for table in TABLES:
        assert f"Source: {table.paper}. Its scale: {table.scale}. Our counterpart: {table.ours}." in text
        assert {len(cells) for _, _, cells in table.rows} == {len(table.columns) - 1}
        assert bool(table.measures) != table.ours.startswith("none: ")


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
    assert f"ttt_mlp {bits:.3f} bits per byte at 4,096 tokens" in of(table, "TTT-MLP overtakes")
    assert "decode at 4,096 tokens, batch 4" in of(table, "Mamba has 4 to 5")
    assert "67% at 256 tokens" in of(table, "the first pass takes")  # 0.4 of the whole, over the rest
    assert of(table, "contexts beyond 2M") == "tiny: 4,096 tokens"


def test_what_they_lack_is_not_measured(table: dict[str, str]) -> None:
    for start in ("the dual form", "base → singular-value experts", "Mamba's loss stops"):
        assert of(table, start) == NOT_MEASURED


def test_our_columns_stand_beside_the_published_tables(text: str, builder: ModuleType) -> None:
    language = published(text, "Titans and its baselines")
    assert language[""][-1] == "tiny: bits per byte at 4,096 tokens"
    assert language["MAG"][-1] == f"{builder.bits_per_byte('titans_mag', 4096):.3f}"
    assert language["Mamba-2"][:3] == ["–"] * 3
    needles = published(text, "A needle in a haystack")
    assert needles[""][-1] == "tiny: our needle, %, at 256 / 512 / 1,024 / 2,048 / 4,096 tokens"
    found = [
        [
            builder.needle_point("titans_mac", context, depth, run_id="x").metrics["accuracy"]
            for depth in builder.DEPTHS
        ]
        for context in builder.CONTEXTS
    ]
    assert needles["MAC"][-1] == " / ".join(f"{100 * sum(some) / len(some):.0f}" for some in found)
    parts = published(text, "Titans' memory with one component less")
    assert parts["LMM"][-1] == needles["LMM"][-1] and parts["no decay"][-2:] == [NOT_MEASURED] * 2
    assert len(published(text, "From linear attention")["+ learned eta"]) == 1


def test_tables_without_records_of_ours_are_not_measured(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = builder.write_experiment(
        tmp_path, archs=("mamba2",), change=lambda p: p if p.task == "latency" else None
    )
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert published(out, "Titans and its baselines")[""][-1] == "bits per byte"
    assert published(out, "A needle in a haystack")["Mamba-2"][-1] == NOT_MEASURED


def test_prefill_is_shown_at_every_batch_and_lacks_the_papers(table: dict[str, str]) -> None:
    shown = of(table, "TTT-Linear is ahead")
    assert "(batch 1); ahead from" in shown and shown.endswith("(batch 4); batch 16 not measured")
    assert "batch 16" not in of(table, "state-space duality crosses")


def test_prefill_at_the_papers_batch(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(point: Point) -> Point:
        is_larger = point.cell.get("batch_size") == 4
        return replace(point, cell={**point.cell, "batch_size": 16}) if is_larger else point

    folder = builder.write_experiment(tmp_path, archs=("transformer", "ttt_linear"), change=change)
    assert main([str(folder)]) == 0
    shown = of(rows(capsys.readouterr().out), "TTT-Linear is ahead")
    assert shown.endswith("(batch 16)") and "not measured" not in shown


def test_gains_of_experts_stand_beside_the_papers(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = builder.write_experiment(tmp_path, archs=("transformer_squared",))
    for name, accuracy in (("base", 0.5), ("expert", 0.5625), ("lora", 0.53)):
        cell, metrics = {"domain": "stdlib", "adaptation": name}, {"accuracy": accuracy}
        path = folder / "records" / "transformer_squared-tiny-seed0.jsonl"
        run_id = "run-transformer_squared-0"
        append(path, builder.point("transformer_squared", "adaptation", cell, run_id=run_id, metrics=metrics))
    assert main([str(folder)]) == 0
    gains = of(rows(capsys.readouterr().out), "base → singular-value experts")
    assert gains == "tiny: stdlib 50.0 → 56.2% (53.0%)"


def test_comparisons_of_kernels_stand_beside_their_claim(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = builder.write_experiment(tmp_path, archs=("mamba",))
    measured = {"layer_prefill_b16_8192": 1.25, "layer_prefill_b16_2048": None, "ssd_forward": 3.0}
    for name, speed in measured.items():
        fields = {"run_id": "run-mamba-0", "metrics": {"speed": speed}}
        append(_records(folder), builder.point("", "kernel", {"case": name}, **fields))
    failed = builder.point("", "kernel", {"case": "layer_prefill_b16_32768"}, run_id="run-mamba-0")
    append(_records(folder), replace(failed, status="oom", reason="too large"))
    assert main([str(folder)]) == 0
    assert of(rows(capsys.readouterr().out), "TTT-Linear is ahead") == (
        "layer_prefill_b16_2048: not measured; layer_prefill_b16_8192: 1.25 times as fast; "
        "layer_prefill_b16_32768: oom"
    )


def _records(folder: Path) -> Path:
    return folder / "records" / "mamba-tiny-seed0.jsonl"


def test_the_comparisons_of_kernels_that_claims_name_exist() -> None:
    assert {name for claim in CLAIMS for name in claim.kernel_cases} <= set(LINES)


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
