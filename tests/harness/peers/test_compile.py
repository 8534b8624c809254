"""Compiling for a card that is not here: a kernel of ours, and one that cannot be compiled, in a process of
their own, since kernels are interpreted in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.peers import compile as kernel_compile

REPOSITORY = Path(__file__).resolve().parents[3]

SCRIPT = """
import json
from dataclasses import asdict
from unittest import mock

import torch
import triton
import triton.language as tl

from archs.ops.selective_scan import selective_step
from harness.peers.compile import compiled_instead_of_run


@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), not_there)


def step(dtype):
    x, dt, maps = torch.empty(2, 32, dtype=dtype), torch.empty(2, 32), torch.empty(2, 8, dtype=dtype)
    A, D, state = torch.empty(32, 8), torch.empty(32), torch.empty(2, 32, 8)
    selective_step(x, dt, A, maps, maps, D, state, implementation="triton")


with compiled_instead_of_run(90) as found:
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
        step(dtype)
    _broken_kernel[(1,)](torch.empty(16), 16)
with mock.patch("harness.peers.compile.SHARED_BYTES", {90: 0}), compiled_instead_of_run(90) as too_large:
    step(torch.bfloat16)
found += too_large
print(json.dumps([asdict(compiled) for compiled in found]))
"""


@pytest.fixture
def _can_compile() -> None:
    triton = pytest.importorskip("triton", reason="needs the extra `kernels`")
    try:
        found = Path(triton.knobs.nvidia.ptxas.path).is_file()
    except (AttributeError, RuntimeError):
        found = False
    if not found:
        pytest.skip("this triton has no ptxas")


@pytest.mark.usefixtures("_can_compile")
@pytest.mark.compiles
def test_launches_are_compiled_and_what_does_not_compile_is_said(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    narrow, wide, broken, large = json.loads(done.stdout)  # the second launch in bfloat16 is the same binary
    for compiled, dtypes in ((narrow, "bfloat16/float32"), (wide, "float32")):
        assert compiled["kernel"].startswith(f"selective_scan._step_kernel {dtypes} BLOCK=")
        assert 8 <= compiled["registers"] <= 255 and compiled["error"] is None
        assert compiled["spill_bytes"] == 0 and compiled["shared_bytes"] >= 0
    assert "_broken_kernel" in broken["kernel"] and "not_there" in broken["error"]
    assert broken["registers"] is None
    assert large["kernel"] == narrow["kernel"] and "bytes shared" in large["error"]
    assert "FAILED: " in kernel_compile._text(kernel_compile.Compiled(**broken))


def test_the_models_of_the_experiments_choose_our_kernels() -> None:
    for arch, expected in (("mamba2", True), ("titans_lmm", True), ("recurrent", False)):
        for experiment, size in kernel_compile.MODELS:
            config = kernel_compile.model_config(arch, experiment, size)
            assert kernel_compile.has_kernels(config) == expected, (arch, size)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "huge"], ["--size huge", "1.3b"]),
        (["--size", "small"], ["TRITON_INTERPRET", "unset"]),
    ],
)
def test_what_is_wrong_is_a_sentence(
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel_compile.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and all(word in error for word in words)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("nothing", "no arch 'nothing'; choose of gated_deltanet, hybrid, mamba"),
        ("pretrained", "no arch 'pretrained'"),
        ("recurrent", "recurrent has no Triton kernel of ours"),
    ],
)
def test_an_architecture_that_cannot_serve_is_a_sentence(
    arch: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernel_compile.main([arch]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert words in error
