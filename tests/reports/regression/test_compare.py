"""The regression check: every kind of worse value is caught, and an unchanged folder is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness.record.schema import Point, content_hash
from reports.regression.compare import main

ARCHS = ("transformer", "mamba")


@pytest.fixture
def baseline(builder: ModuleType, tmp_path: Path) -> Path:
    """A baseline of two architectures, one cell of which failed already."""
    folder = builder.write_experiment(tmp_path / "before", archs=ARCHS, change=_before(builder))
    path = tmp_path / "baselines" / "smoke.json"
    assert main([str(folder), str(path), "--renew"]) == 0
    return path


def _before(builder: ModuleType) -> Callable[[Point], Point]:
    def change(point: Point) -> Point:
        is_hit = point.task == "latency" and point.arch == "mamba" and point.cell["context_tokens"] == 4096
        return builder.failed(point, "timeout", "slow") if is_hit else point

    return change


Check = Callable[[Callable[[Point], Point | None]], tuple[int, str]]


@pytest.fixture
def check(builder: ModuleType, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Measures again with a change planted, and returns exit status and output."""

    def run(change: Callable[[Point], Point | None]) -> tuple[int, str]:
        def both(point: Point) -> Point | None:
            return change(_before(builder)(point))

        folder = builder.write_experiment(tmp_path / "now", archs=ARCHS, change=both)
        capsys.readouterr()
        status = main([str(folder), str(baseline)])
        return status, capsys.readouterr().out

    return run


def metric(task: str, name: str, difference: float, **cell: Any) -> Callable[[Point], Point]:
    """Adds to one metric of Mamba's points of a task."""

    def change(point: Point) -> Point:
        is_cell = all(point.cell.get(key) == value for key, value in cell.items())
        value = point.metrics.get(name)
        if point.arch != "mamba" or point.task != task or not is_cell or value is None:
            return point
        return replace(point, metrics={**point.metrics, name: value + difference})

    return change


def card(name: str, factor: float) -> Callable[[Point], Point]:
    """Multiplies one entry of Mamba's cost card."""

    def change(point: Point) -> Point:
        if point.arch != "mamba" or point.task != "cost":
            return point
        values = {**point.details[name], "4096": point.details[name]["4096"] * factor}
        return replace(point, details={**point.details, name: values})

    return change


def test_an_unchanged_folder_passes(check: Check) -> None:
    status, output = check(lambda point: point)
    assert status == 0 and "Nothing changed." in output and "0 worse of 0" in output


@pytest.mark.parametrize(
    ("task", "name", "difference", "cell"),
    [
        ("train", "final_validation_bits_per_byte", 0.06, {}),
        ("perplexity", "bits_per_byte", 0.06, {"context_tokens": 1024}),
        ("needle", "answer_log_probability_nats", -0.31, {}),
    ],
)
def test_worse_quality_fails_and_better_or_tolerated_passes(
    check: Check, task: str, name: str, difference: float, cell: dict[str, Any]
) -> None:
    status, output = check(metric(task, name, difference, **cell))
    (line,) = [line for line in output.splitlines() if line.endswith("worse")]
    assert status == 1 and name in line and "mamba" in line and "1 worse of 1" in output


@pytest.mark.parametrize(
    ("task", "name", "difference"),
    [
        ("train", "final_validation_bits_per_byte", -0.06),
        ("perplexity", "bits_per_byte", -0.06),
        ("needle", "answer_log_probability_nats", 0.31),
    ],
)
def test_better_quality_is_reported_and_passes(check: Check, task: str, name: str, difference: float) -> None:
    status, output = check(metric(task, name, difference))
    assert status == 0 and "improved" in output and name in output


@pytest.mark.parametrize("difference", [0.04, -0.04])
def test_within_the_tolerance_is_no_change(check: Check, difference: float) -> None:
    assert "Nothing changed." in check(metric("perplexity", "bits_per_byte", difference))[1]


@pytest.mark.parametrize("difference", [1, -1])
def test_another_number_of_parameters_fails_either_way(check: Check, difference: int) -> None:
    status, output = check(metric("cost", "num_parameters", difference))
    assert status == 1 and "num_parameters" in output and "differs" in output


@pytest.mark.parametrize("name", ["state_bytes", "prefill_flops_per_token", "decode_flops_per_token"])
@pytest.mark.parametrize("factor", [1 + 1e-9, 0.5])
def test_another_cost_fails_either_way(check: Check, name: str, factor: float) -> None:
    status, output = check(card(name, factor))
    assert status == 1 and f"cost.{name} at context_tokens=4096" in output and "differs" in output


def test_a_cell_that_fails_now_is_caught(builder: ModuleType, check: Check) -> None:
    def change(point: Point) -> Point:
        is_hit = point.arch == "mamba" and point.cell == {"context_tokens": 512, "depth": 0.5}
        return builder.failed(point, "crashed", "planted") if is_hit else point

    status, output = check(change)
    assert status == 1 and "needle context_tokens=512, depth=0.5" in output and "crashed" in output


def test_a_cell_that_is_gone_is_caught(check: Check) -> None:
    status, output = check(lambda point: None if point.cell.get("learning_rate") == 1e-3 else point)
    assert status == 1 and output.count("missing") == 2


def test_a_cell_that_failed_before_must_not_vanish_either(check: Check) -> None:
    def change(point: Point) -> Point | None:
        return None if point.arch == "mamba" and point.status == "timeout" else point

    status, output = check(change)
    assert status == 1 and "missing" in output


def test_an_architecture_that_is_gone_is_caught(check: Check) -> None:
    status, output = check(lambda point: None if point.arch == "mamba" else point)
    assert status == 1 and "mamba" in output and "missing" in output


def test_a_lost_number_in_a_cell_that_ran_is_caught(check: Check) -> None:
    def change(point: Point) -> Point:
        is_hit = point.arch == "mamba" and point.task == "train"
        return (
            replace(point, metrics={**point.metrics, "final_validation_bits_per_byte": None})
            if is_hit
            else point
        )

    status, output = check(change)
    assert status == 1 and "final_validation_bits_per_byte" in output and "missing" in output


def test_a_cell_that_works_now_is_an_improvement(builder: ModuleType, baseline: Path, tmp_path: Path) -> None:
    folder = builder.write_experiment(tmp_path / "now", archs=ARCHS)
    assert main([str(folder), str(baseline)]) == 0


def test_slower_is_reported_and_never_fails(check: Check) -> None:
    def change(point: Point) -> Point:
        is_hit = point.task == "latency" and point.arch == "mamba" and point.metrics
        return (
            replace(point, metrics={**point.metrics, "median_ms": 99.0 * (point.metrics["median_ms"] or 0)})
            if is_hit
            else point
        )

    status, output = check(change)
    assert status == 0 and "slower" in output and "× calibration" in output


def test_a_slower_machine_is_no_slower_model(check: Check) -> None:
    def change(point: Point) -> Point:
        metrics = {
            name: 3 * value
            if name in ("median_ms", "matmul_ms", "train_seconds") and value is not None
            else value
            for name, value in point.metrics.items()
        }
        return replace(point, metrics=metrics)

    assert "Nothing changed." in check(change)[1]


def test_a_new_architecture_is_reported_and_passes(
    builder: ModuleType, baseline: Path, tmp_path: Path
) -> None:
    folder = builder.write_experiment(tmp_path / "now", archs=(*ARCHS, "hybrid"), change=_before(builder))
    assert main([str(folder), str(baseline)]) == 0


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(path.read_text()[:-40]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: edit(path, lambda value: value.update(schema_version=99)),
        lambda path: edit(path, lambda value: value.pop("tolerances")),
        lambda path: edit(path, lambda value: value["tolerances"].clear()),
        lambda path: edit(path, lambda value: value["entries"].clear()),
        lambda path: edit(path, lambda value: value["entries"]["mamba tiny seed 0"]["exact"].clear()),
        lambda path: edit(path, lambda value: value["entries"].update({"mamba tiny seed 0": {"odd": {}}})),
    ],
)
def test_a_baseline_that_cannot_be_used_is_status_2(
    baseline: Path, tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(baseline)
    capsys.readouterr()
    assert main([str(tmp_path / "before"), str(baseline)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "baseline" in error


def test_no_records_and_nothing_in_common_are_status_2(
    builder: ModuleType, baseline: Path, tmp_path: Path
) -> None:
    assert main([str(tmp_path / "none"), str(baseline)]) == 2
    other = builder.write_experiment(tmp_path / "other", archs=("hybrid",))
    assert main([str(other), str(baseline)]) == 2
    failed = builder.write_experiment(
        tmp_path / "failed", archs=ARCHS, change=lambda point: builder.failed(point, "crashed", "planted")
    )
    assert main([str(failed), str(baseline)]) == 2
    assert main([str(failed), str(tmp_path / "new.json"), "--renew"]) == 2
    assert not (tmp_path / "new.json").exists()


def test_the_baselines_own_tolerances_rule_and_outlive_a_renewal(
    builder: ModuleType, baseline: Path, tmp_path: Path
) -> None:
    edit(baseline, lambda value: value["tolerances"].update({"perplexity.bits_per_byte": 0.001}))
    change = metric("perplexity", "bits_per_byte", 0.01)
    folder = builder.write_experiment(
        tmp_path / "now", archs=ARCHS, change=lambda point: change(_before(builder)(point))
    )
    assert main([str(folder), str(baseline)]) == 1
    assert main([str(folder), str(baseline), "--renew"]) == 0
    assert json.loads(baseline.read_text())["tolerances"]["perplexity.bits_per_byte"] == 0.001
    assert main([str(folder), str(baseline)]) == 0


def test_a_tolerance_that_no_task_declares_is_said_to_be_unused(baseline: Path, check: Check) -> None:
    edit(baseline, lambda value: value["tolerances"].update(bits_per_byte=0.001))
    status, output = check(lambda point: point)
    assert status == 0 and "tolerance of bits_per_byte is not used" in output


def version_1(builder: ModuleType) -> dict[str, Any]:
    """A baseline of Mamba alone as it was written before numbers were named by their task."""
    needle = [
        builder.needle_point("mamba", context, depth, run_id="x").metrics["answer_log_probability_nats"]
        for context in builder.CONTEXTS
        for depth in builder.DEPTHS
    ]
    entry = {
        "exact": {"num_parameters": 1_000_500, "state_bytes at 4096": builder.state_bytes("mamba", 4096)},
        "quality": {
            "final_validation_bits_per_byte": 2.05,
            "bits_per_byte at 1024": builder.bits_per_byte("mamba", 1024),
            "answer_log_probability_nats": sum(needle) / len(needle),
        },
        "time": {"training": 0.001, "latency batch_size=1, context_tokens=1024, phase=decode": 1000.0},
        "cells": {"perplexity context_tokens=1024": "ok"},
    }
    entries = {"mamba tiny seed 0": entry}
    tolerances = {
        "final_validation_bits_per_byte": 0.05,
        "bits_per_byte": 0.05,
        "answer_log_probability_nats": 0.3,
    }
    return {
        "schema_version": 1,
        "entries": entries,
        "tolerances": tolerances,
        "content_hash": content_hash(entries),
    }


def test_a_baseline_of_version_1_is_read_and_what_is_new_does_not_fail(
    builder: ModuleType, baseline: Path, check: Check
) -> None:
    baseline.write_text(json.dumps(version_1(builder)))
    status, output = check(lambda point: point)
    verdicts = {line.split()[-1] for line in output.splitlines() if line.startswith("mamba")}
    assert status == 0 and verdicts == {"new", "slower", "faster"}
    for line in output.splitlines():
        name = line.removeprefix("mamba tiny seed 0").strip()
        assert line.endswith("slower") == name.startswith("train.train_seconds")
        assert line.endswith("faster") == name.startswith("latency.median_ms at batch_size=1, context_tok")


@pytest.mark.parametrize(
    ("task", "name", "difference"),
    [
        ("train", "final_validation_bits_per_byte", 0.06),
        ("perplexity", "bits_per_byte", 0.06),
        ("needle", "answer_log_probability_nats", -0.31),
        ("cost", "num_parameters", 1),
    ],
)
def test_a_baseline_of_version_1_guards_what_it_holds(
    builder: ModuleType, baseline: Path, check: Check, task: str, name: str, difference: float
) -> None:
    baseline.write_text(json.dumps(version_1(builder)))
    status, output = check(metric(task, name, difference))
    (line,) = [line for line in output.splitlines() if line.endswith(("worse", "differs"))]
    assert status == 1 and f"{task}.{name}" in line


def test_the_tolerances_of_a_baseline_of_version_1_rule(
    builder: ModuleType, baseline: Path, check: Check
) -> None:
    value = version_1(builder)
    value["tolerances"]["bits_per_byte"] = 0.07
    baseline.write_text(json.dumps(value))
    assert check(metric("perplexity", "bits_per_byte", 0.06))[0] == 0
    assert check(metric("perplexity", "bits_per_byte", 0.08))[0] == 1
