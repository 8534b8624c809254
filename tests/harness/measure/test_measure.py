"""How time, memory and the machine are measured."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import torch

from harness.measure.memory import PeakMemory
from harness.measure.time import copy_bytes_per_s, matmul_flops_per_s, time_call_ms
from harness.record import environment
from harness.record.outcomes import is_out_of_memory, outcome

CPU = torch.device("cpu")


def test_a_call_is_timed_in_milliseconds() -> None:
    assert 30 <= time_call_ms(lambda: time.sleep(0.03), CPU) < 3000


def test_the_ceilings_are_bytes_and_operations_over_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([4.0, 1.0, 9.0] * 2)
    monkeypatch.setattr("harness.measure.time.time_call_ms", lambda call, device: (call(), next(times))[1])
    assert copy_bytes_per_s(CPU, num_bytes=1000, num_calls=3) == pytest.approx(2 * 1000 / 4e-3)
    flops = matmul_flops_per_s(CPU, torch.bfloat16, width=8, num_calls=3)
    assert flops == pytest.approx(2 * 8**3 / 4e-3)


def test_peak_memory_is_the_most_that_the_block_held_at_once() -> None:
    size = 64 << 20
    kept = torch.ones(size, dtype=torch.uint8)  # held before the block: not the block's
    with PeakMemory(CPU) as memory:
        torch.ones(size, dtype=torch.uint8)  # freed at once
        torch.ones(size // 2, dtype=torch.uint8)
    assert memory.bytes == size
    with PeakMemory(CPU) as memory:
        del kept
    assert memory.bytes == 0


def test_peak_memory_does_not_depend_on_what_ran_before() -> None:
    def peak_bytes() -> int | None:
        with PeakMemory(CPU) as memory:
            values = torch.ones(2 << 20)
            for _ in range(3):
                values = values * 2 + torch.ones(1 << 18).sum()
        return memory.bytes

    first = peak_bytes()
    for _ in range(2):  # freed, and kept by the allocator for later
        torch.ones(30 << 20, dtype=torch.uint8)
    assert first is not None and 24 << 20 <= first < 25 << 20, "three tensors of 8 MiB are alive at once"
    assert peak_bytes() == first


def test_peak_memory_counts_a_storage_once() -> None:
    given = torch.ones(1 << 20, dtype=torch.uint8)
    with PeakMemory(CPU) as memory:
        views = [given.view(1024, 1024).T, given[5:], *given.split(1000)]  # nothing new
        given.add_(1)
        made = torch.empty(1 << 10, dtype=torch.uint8)
        views += [made[3:], made.view(32, 32), made.add_(1)]
        torch.add(made, 1, out=made)
    assert memory.bytes == 1 << 10 and len(views) > 6


def test_peak_memory_follows_tensors_into_layers_and_gradients() -> None:
    layer, x = torch.nn.Linear(256, 1024, bias=False), torch.ones(512, 256, requires_grad=True)
    with PeakMemory(CPU) as memory:
        layer(x).sum().backward()
    # The output is freed before its gradient, an expanded scalar, meets the weight.
    gradients = layer.weight.nbytes + x.nbytes
    assert memory.bytes is not None and memory.bytes >= max(gradients, 512 * 1024 * 4)
    with PeakMemory(CPU) as memory, torch.no_grad():
        layer(x)
    assert memory.bytes == 512 * 1024 * 4


def test_a_block_that_fails_is_measured_up_to_there() -> None:
    memory = PeakMemory(CPU)
    with pytest.raises(ZeroDivisionError), memory:
        torch.ones(1 << 20, dtype=torch.uint8)
        raise ZeroDivisionError
    assert memory.bytes == 1 << 20


def test_a_lack_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.cuda.OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (NotImplementedError("no such length"), "unsupported"),
        (RuntimeError("shapes do not match"), "crashed"),
        (ZeroDivisionError(), "crashed"),
    ],
)
def test_an_exception_becomes_a_status_and_a_reason(error: Exception, status: str) -> None:
    found, reason = outcome(error)
    assert found == status and reason.startswith(type(error).__name__) and "\n" not in reason


def test_the_environment_is_plain_data_about_this_machine() -> None:
    found = environment.describe(CPU)
    assert found["device"] == "cpu" and found["torch"] == torch.__version__
    assert found["num_cpus"] >= 1 and found["memory_bytes"] > 1 << 28
    assert found["gpu_name"] is None and found["packages"]["hydra-core"].startswith("1.3")


def test_the_commit_comes_from_git_or_from_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LONGARCH_GIT_COMMIT", raising=False)
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    assert environment.git_commit() == (None, None), "no .git"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    commit, is_dirty = environment.git_commit()
    assert commit is not None and len(commit) == 40 and is_dirty is False
    (tmp_path / "file").write_text("two")
    assert environment.git_commit() == (commit, True)
    monkeypatch.setenv("LONGARCH_GIT_COMMIT", "abc")
    assert environment.git_commit() == ("abc", False)
    monkeypatch.setenv("LONGARCH_GIT_COMMIT", "abc-dirty")
    assert environment.git_commit() == ("abc", True)
