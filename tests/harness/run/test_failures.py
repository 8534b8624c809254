"""Whatever ends a measurement becomes a typed record, and the rest is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.record.schema import Header, Point
from harness.run import supervision as jobs

PLUGIN_CONF = Path(__file__).resolve().parent.parent / "plugin" / "conf"

Points = Callable[..., list[Point]]
RunTiny = Callable[..., list[Point]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def outcomes(points: Points, output: Path) -> dict[str, str]:
    """Status of each cell of the task `faults`."""
    found = points(output, task="faults")
    assert len({p.key for p in found}) == len(found), "a cell was recorded twice"
    return {p.cell["fault"]: p.status for p in found}


def test_every_fault_is_typed_and_the_job_goes_on(
    run_tiny: RunTiny, points: Points, output: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    faults = "none-1,segfault,oom,mistake,killed,unsupported,undeclared,exit,none-2"
    failures = run_tiny(output, "task=[faults]", f"tasks.faults.faults=[{faults}]", f"tasks.faults.log={log}")
    assert outcomes(points, output) == {
        "none-1": "ok",
        "segfault": "crashed",
        "oom": "oom",
        "mistake": "crashed",
        "killed": "oom",
        "unsupported": "unsupported",
        "undeclared": "crashed",
        "exit": "crashed",
        "none-2": "ok",
    }
    assert log.read_text().split() == faults.split(","), "every cell began once"
    reasons = {p.cell["fault"]: p.reason or "" for p in points(output, task="faults")}
    assert "SIGSEGV" in reasons["segfault"] and "exit code 7" in reasons["exit"]
    assert "IndexError: list index out of range" in reasons["mistake"]
    assert "tasks.faults measured undeclared, which its METRICS do not declare" in reasons["undeclared"]
    assert "SIGKILL" in reasons["killed"] and "out of memory" in reasons["oom"]
    assert {p.cell["fault"]: p.status for p in failures} == {
        name: status for name, status in outcomes(points, output).items() if status != "ok"
    }
    assert len(points(output, task="train")) == 1, "the trained model was loaded after a crash"
    assert all(p.metrics == {"answer": 42} for p in points(output, task="faults", status="ok"))
    assert not list((output / "jobs").iterdir())


def test_a_death_before_the_first_cell_leaves_what_is_measured(
    run_tiny: RunTiny, points: Points, output: Path, tmp_path: Path
) -> None:
    overrides = ["task=[faults]", "tasks.faults.faults=[a]", f"tasks.faults.log={tmp_path / 'log'}"]
    overrides += ["tasks.faults.prepare_fault=killedlater"]
    assert run_tiny(output, *overrides) == []
    kept = points(output)
    assert run_tiny(output, *overrides) == []
    assert (tmp_path / "log").read_text().split().count("killedlater") == 3, "killed, and started again"
    assert points(output) == kept


def test_a_job_that_is_late_types_the_cell_under_way_and_those_left(
    run_tiny: RunTiny, points: Points, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"

    def is_second() -> bool:
        """The deadline passes when the second cell is under way, however slow the machine is."""
        return log.exists() and "sleep" in log.read_text()

    monkeypatch.setattr(jobs, "monotonic", lambda: time.monotonic() + 1e6 * is_second())
    overrides = ["task=[faults]", "tasks.faults.faults=[none,sleep,none-2]", f"tasks.faults.log={log}"]
    run_tiny(output, *overrides, "job_timeout_s=120")
    assert outcomes(points, output) == {"none": "ok", "sleep": "timeout", "none-2": "timeout"}
    assert all("job_timeout_s=120" in (p.reason or "") for p in points(output, status="timeout"))


def test_a_job_that_is_late_before_its_first_cell_types_them_all(
    run_tiny: RunTiny, points: Points, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "POLL_S", 0.001)  # or it is done when it is looked at first
    overrides = ["task=[faults]", "tasks.faults.faults=[a,b]", f"tasks.faults.log={tmp_path / 'log'}"]
    run_tiny(output, *overrides, "job_timeout_s=0.01")
    assert outcomes(points, output) == {"a": "timeout", "b": "timeout"}


def test_a_death_in_a_search_is_put_down_to_training(
    run_tiny: RunTiny, points: Points, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late at the second rate: the first one's record has taken away what named training."""

    def is_second() -> bool:
        has_first = bool(points(output, task="learning_rate_search"))
        return has_first and bool(list((output / "jobs").glob("*.in_flight.json")))

    monkeypatch.setattr(jobs, "monotonic", lambda: time.monotonic() + 1e6 * is_second())
    search = ["train.search=true", "train.search_grid=[1e-3,2e-3]", "train.num_steps=200"]
    failures = run_tiny(output, "task=[]", *search, "job_timeout_s=120")
    assert [(p.task, p.status) for p in failures] == [("train", "timeout")]


def test_a_death_before_the_first_cell_types_them_all(
    run_tiny: RunTiny, points: Points, records: Callable[[Path], list], output: Path, tmp_path: Path
) -> None:
    overrides = ["task=[faults]", "tasks.faults.faults=[a,b]", f"tasks.faults.log={tmp_path / 'log'}"]
    run_tiny(output, *overrides, "tasks.faults.prepare_fault=segfault", is_forked=False)
    assert outcomes(points, output) == {"a": "crashed", "b": "crashed"}
    assert [p.status for p in points(output, task="train")] == ["crashed"]
    runs = {record.run_id for record in records(output) if isinstance(record, Header)}
    assert {p.run_id for p in points(output)} <= runs, "every point has its header"


@pytest.mark.parametrize(("fault", "expected"), [("mistake", 1), ("unsupported", 0), ("none", 0)])
def test_a_crash_caught_in_the_worker_is_printed_and_decides_the_exit_status(
    fault: str,
    expected: int,
    quick_command: Callable[..., tuple[int, str, str]],
    tiny: list[str],
    output: Path,
    tmp_path: Path,
) -> None:
    overrides = [
        f"--config-dir={PLUGIN_CONF}",
        *tiny,
        "task=[faults]",
        f"tasks.faults.faults=[{fault},none-2]",
    ]
    code, _, err = quick_command(*overrides, f"tasks.faults.log={tmp_path / 'log'}", f"output={output}")
    assert code == expected, err
    printed = [line for line in err.splitlines() if line.startswith("transformer, faults")]
    assert len(printed) == (fault != "none")
    assert all(f"'fault': '{fault}'" in line for line in printed)


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_an_error_of_a_model_is_a_record_and_no_mistake_of_the_users(
    error: type[Exception],
    quick_command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    points: Points,
    tiny: list[str],
    tiny_tasks: list[str],
    output: Path,
    tmp_path: Path,
) -> None:
    def fail(self: object, *arguments: object) -> None:
        raise error("a shape that does not fit")

    latency = [override for override in tiny_tasks if override.startswith("tasks.latency")]
    arguments = [f"--config-dir={PLUGIN_CONF}", *tiny, f"output={output}"]
    monkeypatch.setattr("toy_package.average.RunningAverage.prefill", fail)
    code, _, err = quick_command(*arguments, "task=[latency]", *latency, "archs=[transformer,toy]")
    assert code == 1, err
    statuses = [(p.arch, p.status) for p in points(output, task="latency")]
    assert sorted(statuses) == [("toy", "crashed")] * 4 + [("transformer", "ok")] * 4
    code, _, err = quick_command(*arguments, "arch=toy", "task=[]")
    assert code == 1, err
    (train,) = points(output, task="train")
    assert train.status == "crashed" and train.reason == f"{error.__name__}: a shape that does not fit"


def test_divergence_is_typed_for_training_and_every_cell(
    quick_command: Callable[..., tuple[int, str, str]],
    points: Points,
    tiny: list[str],
    tiny_tasks: list[str],
    output: Path,
    tmp_path: Path,
) -> None:
    overrides = [f"--config-dir={PLUGIN_CONF}", "arch=toy", *tiny, "task=[faults,needle]"]
    overrides += [override for override in tiny_tasks if override.startswith("tasks.needle")]
    overrides += ["tasks.faults.faults=[a,b]", f"tasks.faults.log={tmp_path / 'log'}", f"output={output}"]
    code, _, err = quick_command(*overrides, "arch.model.mixers.0.is_poisoned=true")
    assert code == 0, err
    statuses = {(p.task, p.status) for p in points(output) if p.task != "cost"}
    assert statuses == {("train", "diverged"), ("faults", "diverged"), ("needle", "diverged")}
    assert len(points(output, status="diverged")) == 1 + 2 + 2
    assert "step 3" in (points(output, task="train")[0].reason or "")
    assert not (tmp_path / "log").exists()
