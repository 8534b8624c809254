"""The kernel benchmark at toy sizes: parity before any time, typed rows, sentences for what is
missing. Without a GPU the kernels run in Triton's interpreter, and their times say nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from harness import kernels
from harness.kernel_operations import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = ["ttt_mlp_training", "layer_prefill_b16_8192"]  # compared with what is always there
ABSENT = ["selective_scan_forward", "ssd_training"]


def toy(name: str, num_rounds: int = 2) -> dict[str, Any]:
    return kernels.measure(name, num_rounds, DEVICE, torch.float32, is_toy=True)


@pytest.fixture(autouse=True)
def small_interpreter_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter scans a chunk entry by entry."""
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    if DEVICE.type == "cpu":
        monkeypatch.setattr("archs.ops.selective_scan.kernel.CHUNK_TOKENS", 8)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = kernels.importlib.util.find_spec
    absent = {line.package for line in kernels.LINES.values()}
    monkeypatch.setattr(
        kernels.importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name)
    )


@pytest.mark.usefixtures("no_packages")
def test_the_table_has_a_row_a_line_and_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    names = [*OURS, *ABSENT]
    code = kernels.run(names, 1, DEVICE, torch.float32, is_toy=True)
    ceilings, header, *rows, last = capsys.readouterr().out.splitlines()
    values = json.loads(last)
    assert "GB/s" in ceilings and "TFLOP/s" in ceilings and "asked" in header
    assert values["copy_bytes_per_s"] > 0 and values["matmul_flops_per_s"] > 0
    assert [r["line"] for r in values["results"]] == names == [row.split()[0] for row in rows]
    for result, row in zip(values["results"], rows, strict=True):
        assert result["largest_error"] <= 1e-5 and len(result["our_ms"]) == 1
        if result["line"] in OURS:
            assert result["status"] == "ok" and len(result["peer_ms"]) == 1
            ratios = [p / o for p, o in zip(result["peer_ms"], result["our_ms"], strict=True)]
            assert min(ratios) <= result["speed"] <= max(ratios)
        else:
            assert result["status"] == "not measured" and "is not installed" in result["reason"]
            assert result["speed"] is None and result["peer_ms"] is None and result["reason"] in row
        is_serial = kernels.KERNELS[kernels.LINES[result["line"]].kernel].is_serial
        assert (result["serial_floor_ms"] is not None) == is_serial
    assert code == int(not all(map(kernels.holds, values["results"])))


def test_what_differs_from_its_definition_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = kernels.KERNELS["ttt_mlp"]

    def run(inputs: Any, sizes: Any, implementation: str) -> Any:
        y, *rest = exact.run(inputs, sizes, implementation)
        return [y * (1.001 if implementation == "triton" else 1), *rest]

    monkeypatch.setitem(kernels.KERNELS, "ttt_mlp", dataclasses.replace(exact, run=run))
    result = toy("ttt_mlp_training")
    assert result["status"] == "not alike" and "our ttt_mlp is 0.0012 from its" in result["reason"]
    assert result["our_ms"] is None and not kernels.holds(result)


def test_a_nan_is_no_agreement() -> None:
    nan, one = torch.full((2,), float("nan")), torch.ones(2)
    for pair in ([nan, one], [one, nan]):
        with pytest.raises(kernels.NotAlike):
            kernels._held("it", relative_error(pair, [one, one]), 1.0)


def test_what_goes_wrong_is_a_row_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    line = dataclasses.replace(kernels.LINES["ttt_mlp_training"], make=fail)
    monkeypatch.setitem(kernels.LINES, "ttt_mlp_training", line)
    assert (
        kernels.run(["ttt_mlp_training", "layer_prefill_b1_2048"], 1, DEVICE, torch.float32, is_toy=True) == 1
    )
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert first["status"] == "oom" and second["status"] == "ok"


def test_the_lines_ask_for_what_was_set_out() -> None:
    asked = {name: line.minimum_speed for name, line in kernels.LINES.items()}
    for mode in ("forward", "training"):
        assert asked[f"ttt_linear_{mode}"] == 1.3 and asked[f"neural_memory_{mode}"] == 20
        assert asked[f"selective_scan_{mode}"] == 0.7 and asked[f"ssd_{mode}"] == 1.0
    assert asked["ttt_mlp_training"] == 10
    sizes = kernels.LINES["ttt_linear_training"].sizes
    assert sizes["batch_size"] * sizes["num_heads"] >= 512 and sizes["num_tokens"] == 32768


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == "error: harness.kernels times kernels on a GPU, and torch sees no CUDA device here."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["no line 'nothing'", "ssd_forward"]),
        (["--rounds", "0"], ["--rounds 0 must be positive"]),
    ],
)
def test_what_is_wrong_is_a_sentence(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert all(word in error for word in words), error
