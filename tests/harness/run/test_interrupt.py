"""A sweep that is stopped keeps every finished cell, and the same command goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from harness.record.schema import Header, Point


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads here as in the commands: sums are taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PLUGIN_CONF = str(Path(__file__).resolve().parent.parent / "plugin" / "conf")


def wait_for(condition: Callable[[], bool], what: str, process: subprocess.Popen[str] | None = None) -> None:
    """Waits, but not for a process that has ended."""
    deadline = time.monotonic() + 90
    while not condition():
        if process is not None and process.poll() is not None:
            pytest.fail(f"ended before {what}: {process.communicate()[1]}")
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def workers_of(output: Path) -> list[int]:
    """Processes whose command line names the output folder's job files."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "harness.run.worker" in text and str(output) in text:
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """Tests that a shell started in the background ignore SIGINT, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the worker in /proc")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_where_it_was(
    sign: signal.Signals,
    heeds_interrupts: None,
    start: Callable[..., subprocess.Popen[str]],
    quick_command: Callable[..., tuple[int, str, str]],
    trained: Callable[[Path], None],
    tiny: list[str],
    points: Callable[..., list[Point]],
    records: Callable[[Path], list],
    tmp_path: Path,
) -> None:
    output, log = tmp_path / "output", tmp_path / "log"
    trained(output)
    arguments = [f"--config-dir={PLUGIN_CONF}", *tiny, f"output={output}"]
    arguments += ["task=[faults]", "tasks.faults.faults=[none-1,none-2,sleeponce]", f"tasks.faults.log={log}"]
    process = start(*arguments)
    wait_for(lambda: log.exists() and "sleep" in log.read_text(), "the last cell", process)
    if sign is signal.SIGINT:
        os.killpg(process.pid, sign)  # as a terminal does: parent and worker both get it
    else:
        process.kill()
    _, err = process.communicate(timeout=30)
    wait_for(lambda: not workers_of(output), "the worker's end")
    if sign is signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1].startswith("Stopped.") and "Traceback" not in err
    kept = points(output)
    assert {p.cell.get("fault") for p in kept if p.task == "faults"} == {"none-1", "none-2"}

    code, _, err = quick_command(*arguments)
    assert code == 0, err
    assert log.read_text().split() == ["none-1", "none-2", "sleeponce", "sleeponce"]
    found = points(output)
    assert found[: len(kept)] == kept, "nothing was measured twice"
    assert [(p.cell, p.status) for p in found[len(kept) :]] == [({"fault": "sleeponce"}, "ok")]
    assert len({r.run_id for r in records(output) if isinstance(r, Header)}) == 2


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the worker in /proc")
def test_an_interrupt_ends_all_jobs_that_run_at_once(
    heeds_interrupts: None,
    start: Callable[..., subprocess.Popen[str]],
    trained: Callable[[Path], None],
    tiny: list[str],
    points: Callable[..., list[Point]],
    tmp_path: Path,
) -> None:
    output, log = tmp_path / "output", tmp_path / "log"
    trained(output)
    arguments = ["--multirun", f"--config-dir={PLUGIN_CONF}", *tiny, f"output={output}", "num_workers=2"]
    arguments += ["arch=transformer,recurrent,mamba", "task=[faults]"]
    process = start(*arguments, "tasks.faults.faults=[none,sleep]", f"tasks.faults.log={log}")
    wait_for(lambda: log.exists() and log.read_text().count("sleep") == 2, "both last cells", process)
    assert len(workers_of(output)) == 2
    for _ in range(3):  # the parent alone, and an impatient user
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, err = process.communicate(timeout=30)
    wait_for(lambda: not workers_of(output), "the workers' end")
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("Stopped.") and "Traceback" not in err
    assert {(p.arch, p.status) for p in points(output, task="faults")} == {
        ("transformer", "ok"),
        ("recurrent", "ok"),
    }, "what was under way has no record"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the worker in /proc")
def test_a_mistake_in_one_job_ends_the_sweep_and_the_job_beside_it(
    start: Callable[..., subprocess.Popen[str]],
    trained: Callable[[Path], None],
    tiny: list[str],
    points: Callable[..., list[Point]],
    tmp_path: Path,
) -> None:
    output, log = tmp_path / "output", tmp_path / "log"
    trained(output)
    arguments = ["--multirun", f"--config-dir={PLUGIN_CONF}", *tiny, f"output={output}", "num_workers=2"]
    arguments += ["task=[faults]", "tasks.faults.faults=[none-1,sleep]", f"tasks.faults.log={log}"]
    process = start(*arguments, "tasks.faults.prepare_fault=none-0,refuse,none-0")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 2 and not workers_of(output)
    assert [line for line in err.splitlines() if line.startswith("error: ")] == ["error: no such text."]
    assert "Traceback" not in err
    assert sorted(log.read_text().split()) == ["none-0", "none-1", "refuse", "sleep"], "no third job began"
    (kept,) = points(output, task="faults")
    assert (kept.cell["fault"], kept.status) == ("none-1", "ok"), (
        "the job that is stopped has no other record"
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the worker in /proc")
def test_training_that_is_killed_goes_on_with_the_same_numbers(
    start: Callable[..., subprocess.Popen[str]],
    quick_command: Callable[..., tuple[int, str, str]],
    one_thread: None,
    tiny: list[str],
    points: Callable[..., list[Point]],
    tmp_path: Path,
) -> None:
    kept = [override for override in tiny if not override.startswith("train.num_steps")]
    arguments = [*kept, "task=[]", "train.num_steps=60", "train.checkpoint_interval_s=0"]
    process = start(*arguments, f"output={tmp_path / 'cut'}")
    wait_for(lambda: bool(list(tmp_path.glob("cut/checkpoints/*.training"))), "a saved state", process)
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not workers_of(tmp_path), "the worker's end")
    (saved,) = tmp_path.glob("cut/checkpoints/*.training")
    with safe_open(saved, "pt") as file:
        assert 0 < int(file.metadata()["next_step"]) < 60
    for name in ("cut", "whole"):
        assert quick_command(*arguments, f"output={tmp_path / name}")[0] == 0
    (cut,), (whole,) = (points(tmp_path / name, task="train") for name in ("cut", "whole"))
    assert cut.samples == whole.samples and cut.samples["step"] == list(range(60))
    assert not saved.exists(), "the state of a finished training is of no use"
