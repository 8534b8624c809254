"""The kernel benchmark at toy sizes: parity before any time, typed rows, sentences for what is
missing. Without a GPU the kernels run in Triton's interpreter, and their times say nothing."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import get_method

from harness.peers import kernels
from harness.peers.operations import relative_error
from harness.peers.roofline import Ceilings
from harness.record.schema import Header, Point, read

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = ["ttt_mlp_training", "layer_prefill_b16_8192"]  # compared with what is always there
ABSENT = ["selective_scan_forward", "ssd_training"]


def toy(name: str, num_rounds: int = 2) -> dict[str, Any]:
    ceilings = Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s=1e9)
    return kernels.measure(name, num_rounds, DEVICE, torch.float32, ceilings, is_toy=True)


@pytest.fixture(autouse=True)
def small_interpreter_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter scans a chunk entry by entry."""
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    if DEVICE.type == "cpu":
        monkeypatch.setattr("archs.ops.selective_scan.kernel.CHUNK_TOKENS", 8)


def find_peers(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    """Has every package of a peer found, or none; torch looks for others while it runs."""
    find_spec = kernels.importlib.util.find_spec
    peers = {line.package for line in kernels.LINES.values()}
    monkeypatch.setattr(
        kernels.importlib.util,
        "find_spec",
        lambda name, package=None: found if name in peers else find_spec(name, package),
    )


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    find_peers(monkeypatch, None)


@pytest.mark.usefixtures("no_packages")
def test_the_table_has_a_row_a_line_and_every_line_is_a_point(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = [*OURS, *ABSENT]
    code = kernels.run(names, 1, DEVICE, torch.float32, output=str(tmp_path), is_toy=True)
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
        least = max(
            result["flops"] / values["matmul_flops_per_s"], result["bytes"] / values["copy_bytes_per_s"]
        )
        assert result["roofline_ms"] == pytest.approx(1e3 * least)
        median = kernels.percentile(result["our_ms"], 0.5)
        assert result["roofline_fraction"] == pytest.approx(1e3 * least / median)
        assert f"{result['roofline_ms']:.3g} (" in row and f", {result['roofline_of']})" in row
    assert code == int(not all(map(kernels.holds, values["results"])))
    (path,) = (tmp_path / "records").iterdir()
    file_header, *points = list(read(path))
    assert isinstance(file_header, Header)
    declared = {metric.name for metric in file_header.metrics["kernel"]}
    for point, result in zip(points, values["results"], strict=True):
        assert isinstance(point, Point) and point.metrics.keys() == declared
        assert (point.task, point.cell, point.status) == ("kernel", {"case": result["line"]}, "ok")
        assert (point.metrics["speed"], point.reason) == (result["speed"], result["reason"])
        assert point.samples["our_ms"] == result["our_ms"] and point.details["peer"] == result["peer"]


def test_what_differs_from_its_definition_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = kernels.KERNELS["ttt_mlp"]

    def run(inputs: Any, sizes: Any, implementation: str) -> Any:
        y, *rest = exact.run(inputs, sizes, implementation)
        return [y * (1.001 if implementation == "triton" else 1), *rest]

    monkeypatch.setitem(kernels.KERNELS, "ttt_mlp", dataclasses.replace(exact, run=run))
    result = toy("ttt_mlp_training")
    assert result["status"] == "not alike" and "our ttt_mlp is 0.0012 from its" in result["reason"]
    assert result["our_ms"] is None and not kernels.holds(result)


def scan_channels_first(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """What mamba-ssm's selective_scan_fn computes: u and delta (B, E, T), B and C (B, N, T)."""
    h, outputs = torch.zeros(()), []
    for t in range(u.shape[2]):
        dt = delta[:, :, t, None]
        h = torch.exp(dt * A) * h + dt * u[:, :, t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(outputs, dim=2)


def with_a_wrong_gradient(u: Any, *others: Any, **options: Any) -> Any:
    return scan_channels_first(u, *others, **options) + 0.01 * (u - u.detach())


@pytest.mark.parametrize("line", ["selective_scan_forward", "selective_scan_training"])
@pytest.mark.parametrize("scan", [scan_channels_first, with_a_wrong_gradient])
def test_the_call_of_mamba_ssm_that_is_timed_is_the_one_that_is_checked(
    monkeypatch: pytest.MonkeyPatch, scan: Any, line: str
) -> None:
    """In its own layout; the wrapper of archs.ops is not called."""
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[0].shape)
        return scan(*arguments, **options)

    interface = SimpleNamespace(selective_scan_fn=counted)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    find_peers(monkeypatch, object())
    result = toy(line, 1)
    if scan is scan_channels_first:
        assert (
            result["status"] == "ok" and result["peer_largest_error"] < 1e-6 and len(result["peer_ms"]) == 1
        )
    else:
        assert result["status"] == "not alike" and "selective_scan_fn is" in result["reason"]
        assert result["peer_ms"] is None
    assert set(calls) == {(1, 8, 6)}  # channels before tokens, in the check too


@pytest.mark.parametrize("line", ["attention_flash_forward", "attention_flash_training"])
def test_a_kernel_of_torch_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    assert toy(line, 1)["peer_largest_error"] < 1e-6

    def sees_the_future(*qkv: Any, is_causal: bool) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=not is_causal)

    functions = SimpleNamespace(scaled_dot_product_attention=sees_the_future)
    monkeypatch.setattr("harness.peers.calls.F", functions)
    result = toy(line, 1)
    assert result["status"] == "not alike" and "torch FLASH_ATTENTION is" in result["reason"]
    assert result["peer_ms"] is None


def test_every_peer_is_checked() -> None:
    assert all(line.peer_error is not None for line in kernels.LINES.values())


@pytest.mark.parametrize(
    ("line", "operation", "words"),
    [
        ("layer_prefill_b1_2048", "archs.ttt.TTTLinear.run_inner", "layer around ttt_linear"),
        ("layer_prefill_b1_2048", "archs.attention.attention", "attention's layer"),
        ("neural_memory_forward", "archs.titans.memory.neural_memory", "layer around neural_memory"),
    ],
)
def test_a_layer_that_differs_from_itself_around_the_reference_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, line: str, operation: str, words: str
) -> None:
    exact = get_method(operation)

    def off_by_a_little(*arguments: Any, implementation: str, **options: Any) -> Any:
        result = exact(*arguments, implementation=implementation, **options)
        if implementation == "reference":
            return result
        y, *rest = result if isinstance(result, tuple) else (result,)
        y = torch.cat((y[..., :1] + 1e-3, y[..., 1:]), dim=-1)
        return (y, *rest) if rest else y

    is_method = operation.endswith("run_inner")
    monkeypatch.setattr(operation, staticmethod(off_by_a_little) if is_method else off_by_a_little)
    result = toy(line, 1)
    assert result["status"] == "not alike" and words in result["reason"] and result["peer_ms"] is None


@pytest.mark.parametrize(("line", "is_training"), [("ttt_mlp_forward", False), ("ttt_mlp_training", True)])
def test_the_serial_floor_trains_where_the_line_does(
    monkeypatch: pytest.MonkeyPatch, line: str, is_training: bool
) -> None:
    timed = []

    def noted(run: Any, inputs: Any, *, is_training: bool) -> Any:
        timed.append((is_training, inputs[0].shape))
        return lambda: None

    monkeypatch.setattr(kernels, "timed_call", noted)
    cpu = torch.device("cpu")
    sizes = {**kernels._replaced(kernels.LINES[line].sizes, kernels.TOY_SIZES), "num_heads": 3}
    kernels._serial_floor_ms(kernels.LINES[line], sizes, cpu, torch.float32, 1)
    assert timed == [(is_training, (1, 6, 1, 16))]


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
    assert error == "error: harness.peers.kernels times kernels on a GPU, and torch sees no CUDA device here."


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
