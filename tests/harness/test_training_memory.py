"""One training step's memory grows linearly with the sequence, for every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archs.base import SequenceModel
from harness.training_memory import architectures, main, training_peak_bytes
from reports.results.load import load
from tests.conftest import TRAINED

CPU = torch.device("cpu")


def test_four_times_the_tokens_take_little_more_than_four_times_the_memory(
    arch: str, new_model: Callable[..., SequenceModel]
) -> None:
    """4.4 leaves room for what is done once a group of chunks; quadratic memory would be near 16."""
    model = new_model(arch, dtype=torch.float32)
    short, long = (training_peak_bytes(model, n, device=CPU) for n in (128, 512))
    assert 0 < short < long <= 4.4 * short


def test_what_is_quadratic_is_seen_as_such(new_model: Callable[..., SequenceModel]) -> None:
    """The bound can be missed: dense attention keeps its scores for the backward pass."""
    model = new_model("transformer", "implementation.attention=plain", dtype=torch.float32)
    short, long = (training_peak_bytes(model, n, device=CPU) for n in (256, 1024))
    assert long > 8 * short


def test_the_command_prints_a_line_an_architecture_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arch=transformer", "size=nano", "device=cpu"], (64, 128)) == 0
    lines = capsys.readouterr().out.splitlines()
    peaks = json.loads(lines[-1])["transformer"]
    assert list(peaks) == ["64", "128"] and 0 < peaks["64"] < peaks["128"]
    assert lines[1].startswith("transformer ") and lines[1].endswith(f"{peaks['128'] / peaks['64']:.2f}")


def test_all_that_are_trained_are_measured() -> None:
    assert architectures() == sorted(TRAINED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("override", "words"),
    [("device=cuda", "torch sees no CUDA device"), ("arch=[]", "needs an architecture")],
)
def test_another_mistake_is_one_sentence(
    override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([override, "size=nano"]) == 2
    assert words in capsys.readouterr().err


def test_a_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arch=foo"]) == 2
    assert capsys.readouterr().err.startswith("error: Unknown arch: 'foo'")


def test_with_output_every_length_is_a_point_of_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["arch=transformer", "size=nano", "device=cpu", f"output={tmp_path}"]
    assert main(arguments, (64, 128)) == 0
    peaks = json.loads(capsys.readouterr().out.splitlines()[-1])["transformer"]
    results = load([tmp_path])
    found = {str(p.cell["sequence_tokens"]): p.metrics["peak_memory_bytes"] for p in results.points}
    assert found == peaks and {p.task for p in results.points} == {"training_memory"}
    (metric,) = results.metrics("training_memory")
    assert (metric.name, metric.unit, metric.direction) == ("peak_memory_bytes", "bytes", "lower")
