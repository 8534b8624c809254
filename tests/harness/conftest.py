"""Commands and jobs of the harness at the smallest size, on the project's own text."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness import __main__ as command_line
from harness.config.compose import compose_config
from harness.record.schema import Point, read
from harness.run import plan as runner
from harness.run import supervision as jobs
from harness.run import timing_job as interleaved
from harness.run import worker

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PLUGIN = Path(__file__).resolve().parent / "plugin"

#: Seconds of work: a model of two layers, four steps; and three short tasks.
TINY = [
    "size=nano",
    "device=cpu",
    "data=text_folder",
    f"data.path={REPOSITORY / 'tests' / 'corpus'}",
    "train.num_steps=4",
    "train.validation_interval_steps=2",
    "train.stream.batch_tokens=512",
    "train.stream.num_validation_batches=1",
    "train.stream.curriculum=[{until_fraction: 1.0, sequence_tokens: 128}]",
]
TINY_TASKS = [
    "tasks.perplexity.context_lengths_tokens=[128]",
    "tasks.perplexity.num_documents=2",
    "tasks.needle.lengths_tokens=[128]",
    "tasks.needle.depths=[0.0,1.0]",
    "tasks.needle.num_examples=2",
    "tasks.latency.context_lengths_tokens=[64,128]",
    "tasks.latency.num_samples=2",
    "tasks.latency.num_decode_steps=2",
]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The overrides that make model and training small."""
    return list(TINY)


@pytest.fixture(scope="session")
def tiny_tasks() -> list[str]:
    """The overrides that make the three tasks small."""
    return list(TINY_TASKS)


class Result(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """stderr without the line that names the job."""
        return [line for line in self.err.splitlines() if not line.startswith("-- ")]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of commands: a cache of the tests' own, and the plugin's package."""
    return {
        **os.environ,
        "LONGARCH_CACHE": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(PLUGIN)]),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def in_environment(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same environment for what runs in this process and its children."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.syspath_prepend(str(PLUGIN))


@pytest.fixture(scope="session")
def start(environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m MODULE *arguments` in a process group of its own."""

    def popen(*arguments: str, module: str = "harness", **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return popen


@pytest.fixture(scope="session")
def command(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Result]:
    """Runs `python -m MODULE *arguments` to its end."""

    def run(*arguments: str, **options: str) -> Result:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=240)
        return Result(process.returncode, out, err)

    return run


def in_this_process(spec_path: Path, *_: object) -> tuple[int, bool]:
    """In place of jobs._wait. No thread is started to end this process with its parent, and the product that
    a latency job times first is small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_end_with", lambda parent_pid: None)
        patch.setattr(interleaved, "CALIBRATION_WIDTH", 32)
        return worker.main(str(spec_path)), False


@pytest.fixture(scope="session")
def trained(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Lays the checkpoint of the TINY Transformer into an output folder: training in every worker would take
    most of the time of tests that are not about it."""
    source = tmp_path_factory.mktemp("trained") / "output"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        patch.setattr(jobs, "_wait", in_this_process)
        config = runner.job_config(compose_config([*TINY, "task=[]", f"output={source}"]))
        assert runner.run_process("quality", [config], line=0, stopping=threading.Event()) == []

    def lay(output: Path) -> None:
        shutil.copytree(source / "checkpoints", output / "checkpoints", dirs_exist_ok=True)

    return lay


@pytest.fixture
def quick_command(
    in_environment: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """`python -m harness *arguments` inside this process, its worker too: no torch is imported anew,
    and no report is rendered."""

    def run(*arguments: str) -> Result:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; so it is put back
        monkeypatch.setattr(jobs, "_wait", in_this_process)
        monkeypatch.setattr(runner, "_is_sweep_here", lambda: False)  # one worker at a time
        monkeypatch.setattr(sys, "argv", ["harness", *arguments])
        monkeypatch.setattr(command_line, "summarise", lambda folder: print(f"Report: {folder}"))
        capfd.readouterr()
        try:
            code = command_line.main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        return Result(code, *capfd.readouterr())

    return run


class ForkedWorker:
    """In place of the worker's subprocess.Popen: a process that has torch already, forked from one that does
    nothing but import it. It works and dies as the other does, three seconds sooner."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["toy_package.forked"])

    def __init__(self, spec_path: Path, line: int) -> None:
        from toy_package import forked

        arguments = (str(spec_path), dict(os.environ))
        self._process = self.server.Process(target=forked.work, args=arguments, daemon=True)
        self._process.start()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("worker", timeout)
        return code

    def kill(self) -> None:
        self._process.kill()


@pytest.fixture
def run_job(
    in_environment: None, trained: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Point]]:
    """Runs one quality job of the trained TINY Transformer in a worker process and returns its typed
    failures. With `is_forked` false the worker is started as a user's is."""
    start = jobs._start

    def run(output: Path, *overrides: str, kind: str = "quality", is_forked: bool = True) -> list[Point]:
        forks = is_forked and sys.platform == "linux"  # elsewhere a fork of what has numpy may not be safe
        monkeypatch.setattr(jobs, "_start", ForkedWorker if forks else start)
        config = compose_config([*TINY, f"output={output}", *overrides], str(PLUGIN / "conf"))
        trained(output)
        return runner.run_process(kind, [runner.job_config(config)], line=0, stopping=threading.Event())

    return run


@pytest.fixture(scope="session")
def records() -> Callable[[Path], list[Any]]:
    """Every record under a folder's `records`, file by file."""

    def find(output: Path) -> list[Any]:
        return [record for path in sorted((output / "records").glob("*.jsonl")) for record in read(path)]

    return find


@pytest.fixture(scope="session")
def points(records: Callable[[Path], list[Any]]) -> Callable[..., list[Point]]:
    """The points of a folder whose fields are as wanted."""

    def find(output: Path, **wanted: Any) -> list[Point]:
        found = [record for record in records(output) if isinstance(record, Point)]
        return [p for p in found if all(getattr(p, key) == value for key, value in wanted.items())]

    return find
