"""Which experiment `make bench` runs, and why."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from harness import bench


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that the process would have become."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: commands.append(arguments))
    return commands


def put_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str | None) -> None:
    """A path that holds an nvidia-smi of that text, or none."""
    monkeypatch.setenv("PATH", str(folder))
    if script is not None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nvidia-smi").chmod(0o755)


def test_a_gpu_is_used_where_torch_can(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Example GPU")
    bench.main(["seed=1"])
    assert started == [[sys.executable, "-m", "harness", "experiment=gpu_small", "seed=1"]]
    assert "experiment=gpu_small: torch can use a GPU here, Example GPU." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "there is no GPU here"),
        ("exit 9", "there is no GPU here"),
        ("exit 0", "there is no GPU here"),
        ("echo 'GPU 0: Example'", "there is a GPU here, GPU 0: Example, but torch cannot use it"),
    ],
)
def test_the_cpu_is_used_where_torch_has_no_gpu(
    script: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    put_nvidia_smi(tmp_path, monkeypatch, script)
    bench.main([])
    assert started == [[sys.executable, "-m", "harness", "experiment=cpu_small"]]
    assert f"experiment=cpu_small: {reason}" in capsys.readouterr().out


def test_an_experiment_that_is_named_is_the_one_that_runs(started: list[list[str]]) -> None:
    bench.main(["seed=1", "experiment=smoke"])
    assert started == [[sys.executable, "-m", "harness", "seed=1", "experiment=smoke"]]
