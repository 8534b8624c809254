"""Tasks without a section of their own appear on the page by what they declare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness.record.identity import machine_identity
from harness.record.metrics import Metric
from harness.record.schema import Point, append
from reports.draw.table import Table
from reports.page.html import render
from reports.page.terminal import ranking_text
from reports.results.load import ReportError, load
from reports.sections.declared import declared_table

#: What a task declares that no file of the report names.
BINDING = (
    Metric(name="num_pairs_read", label="pairs read", unit="", direction="neither", kind="quality"),
    Metric(
        name="recall",
        label="recall",
        unit="share",
        direction="higher",
        kind="quality",
        low="recall_low",
        high="recall_high",
        is_headline=True,
    ),
    Metric(name="recall_low", label="low end", unit="share", direction="neither", kind="quality"),
    Metric(name="recall_high", label="high end", unit="share", direction="neither", kind="quality"),
    Metric(name="answer_ms", label="time to answer", unit="ms", direction="lower", kind="cost"),
)


def texts(table: Table) -> list[list[str]]:
    return [[f"{cell.text} {cell.note}".strip() for cell in row] for row in table.rows]


@pytest.fixture
def binding(builder: ModuleType, tmp_path: Path) -> Path:
    """Two architectures, two seeds, two cells of a plug-in's task; one cell failed with both seeds."""
    folder = builder.write_experiment(
        tmp_path / "binding",
        archs=("hybrid", "mamba"),
        seeds=(0, 1),
        change=lambda point: None,
        metrics={"binding": BINDING},
    )
    for arch, recall in (("hybrid", 0.5), ("mamba", 0.75)):
        for seed in (0, 1):
            for num_pairs in (8, 64):
                point = builder.point(
                    arch,
                    "binding",
                    {"num_pairs": num_pairs, "context_tokens": 4096},
                    run_id=f"run-{arch}-{seed}",
                    seed=seed,
                    metrics={
                        "recall": recall + 0.02 * seed,
                        "recall_low": recall - 0.1,
                        "recall_high": recall + 0.1,
                        "num_pairs_read": num_pairs,
                    },
                )
                if arch == "hybrid" and num_pairs == 64:
                    point = builder.failed(point, "timeout", "took longer than 60 s")
                append(folder / "records" / f"{arch}-tiny-seed{seed}.jsonl", point)
    return folder


def test_every_cell_is_a_row_with_its_headline_interval_and_seeds(binding: Path) -> None:
    table = declared_table(load([binding]), "binding")
    assert [(column.title, column.unit) for column in table.columns] == [
        ("Architecture", ""),
        ("Num pairs", ""),
        ("Context", "tokens"),
        ("Recall", "higher is better"),
        ("Pairs read", ""),
        ("Seeds", ""),
    ]
    assert texts(table) == [
        ["Hybrid", "8", "4,096", "51% [40%, 60%]", "8", "2"],
        ["Mamba", "8", "4,096", "76% [65%, 85%]", "8", "2"],
        ["Hybrid", "64", "4,096", "timed out", "–", "0"],
        ["Mamba", "64", "4,096", "76% [65%, 85%]", "64", "2"],
    ]
    assert [row[3].is_best for row in table.rows] == [False, True, False, False]


def test_a_plug_ins_task_is_on_the_page(binding: Path, tmp_path: Path) -> None:
    text = render([binding], tmp_path / "page").read_text()
    assert '<section id="task-binding">' in text and '<a href="#task-binding">Binding</a>' in text
    assert "took longer than 60 s" in text


def test_a_task_that_declares_nothing_shows_its_numbers_by_name(binding: Path, builder: ModuleType) -> None:
    point = builder.point("mamba", "old", {}, run_id="run-mamba-0", metrics={"a_number": 1.5, "absent": None})
    append(binding / "records" / "mamba-tiny-seed0.jsonl", point)
    table = declared_table(load([binding]), "old")
    assert [column.title for column in table.columns] == ["Architecture", "A number", "Seeds"]
    assert texts(table) == [["Mamba", "1.50", "1"]]


def write_comparisons(builder: ModuleType, folder: Path) -> Path:
    """Two kernels and a peer, as `python -m harness.peers` and `harness.peers.kernels` write them."""
    speed = Metric(
        name="speed",
        label="times as fast as the peer",
        unit="",
        direction="higher",
        kind="cost",
        low="speed_low",
        high="speed_high",
        is_headline=True,
    )
    path = folder / "records" / "kernels.jsonl"
    header = builder.header(None, run_id="k", metrics={"kernel": (speed,), "peer": (speed,)}, experiment=None)
    append(path, header)
    for task, cell, value in (
        ("kernel", {"case": "ssd"}, 1.5),
        ("kernel", {"case": "attention"}, None),
        ("peer", {"case": "mamba", "context_tokens": 8192}, 2.25),
    ):
        settings = {"sizes": cell, "peer": "theirs"}
        fields: dict[str, Any] = {"status": "unsupported", "reason": "not installed"}
        if value is not None:
            fields = {"metrics": {"speed": value, "speed_low": value - 0.25, "speed_high": value + 0.25}}
        append(
            path,
            replace(
                builder.point("", task, cell, run_id="k", **fields),
                size="",
                identity=machine_identity(task, builder.ENVIRONMENT, settings),
            ),
        )
    return folder


def test_comparisons_alone_make_a_page(builder: ModuleType, tmp_path: Path) -> None:
    folder = write_comparisons(builder, tmp_path / "peers")
    results = load([folder])
    assert results.left_out == {} and len(results.points) == 3
    assert texts(declared_table(results, "kernel")) == [
        ["ssd", "1.50 [1.25, 1.75]", "1"],
        ["attention", "unsupported", "0"],
    ]
    text = render([folder], tmp_path / "page").read_text()
    for words in ("Measured without an architecture: kernel and peer.", "2.25", "not installed"):
        assert words in text
    assert 'id="ranking"' not in text and "No perplexity" not in text


def test_training_memory_is_on_the_page(builder: ModuleType, tmp_path: Path) -> None:
    folder = builder.write_experiment(
        tmp_path / "a",
        archs=("mamba",),
        change=lambda point: None,
        metrics={
            "training_memory": (
                Metric(
                    name="peak_memory_bytes",
                    label="peak memory of a training step",
                    unit="bytes",
                    direction="lower",
                    kind="cost",
                    is_headline=True,
                ),
            )
        },
    )
    point = builder.point(
        "mamba",
        "training_memory",
        {"sequence_tokens": 2048},
        run_id="run-mamba-0",
        metrics={"peak_memory_bytes": 3 * 2**20},
    )
    append(folder / "records" / "mamba-tiny-seed0.jsonl", point)
    assert texts(declared_table(load([folder]), "training_memory")) == [["Mamba", "2,048", "3 MiB", "1"]]
    assert 'id="task-training_memory"' in render([folder], tmp_path / "page").read_text()
    assert "Mamba" in ranking_text(folder)


def test_a_calibration_alone_is_nothing_to_report(builder: ModuleType, tmp_path: Path) -> None:
    def calibration_alone(point: Point) -> Point | None:
        return point if point.task == "calibration" else None

    folder = builder.write_experiment(tmp_path, archs=("mamba",), change=calibration_alone)
    with pytest.raises(ReportError, match="no usable measurement"):
        load([folder])
