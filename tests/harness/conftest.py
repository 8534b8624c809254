"""Commands and jobs of the harness at the smallest size, on the project's own text."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.__main__ import main
from harness.config.compose import compose_config, resolve
from harness.config.schema import parse_job
from harness.record.schema import Point, read
from harness.run import timing_job, worker
from harness.run.job import JobSpec
from harness.run.launcher import Launcher
from harness.run.progress import tell
from harness.run.supervision import StartWorker, run_job, start_worker

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


class WorkerHere:
    """A worker that works in this process, at its start. What a timing job times first is small."""

    def __init__(self, spec_path: Path, line: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timing_job, "CALIBRATION_WIDTH", 32)
            self._code = worker.run(str(spec_path))

    def wait(self, timeout: float | None = None) -> int:
        return self._code

    def kill(self) -> None:
        """It has ended."""


class OneByOne(Launcher):
    """Runs jobs in this process, one after the other."""

    is_local = True

    def run(self, jobs: Sequence[JobSpec], on_end: Callable[[list[Point], int], None]) -> None:
        for job in jobs:
            tell(f"-- {job.name}")
            failures = run_job(job, line=0, stopping=threading.Event(), start_worker=WorkerHere)
            on_end(failures, 0)


@pytest.fixture(scope="session")
def trained(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Lays the checkpoint of the TINY Transformer into an output folder: training in every worker would take
    most of the time of tests that are not about it."""
    source = tmp_path_factory.mktemp("trained") / "output"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        job = model_job(*TINY, "task=[]", f"output={source}")
        assert run_job(job, line=0, stopping=threading.Event(), start_worker=WorkerHere) == []

    def lay(output: Path) -> None:
        shutil.copytree(source / "checkpoints", output / "checkpoints", dirs_exist_ok=True)

    return lay


def model_job(*overrides: str) -> JobSpec:
    """The model job of a command line, which may use the plugin."""
    config = parse_job(resolve(compose_config(list(overrides), str(PLUGIN / "conf"))))
    return JobSpec(is_timing=False, configs=(config,), command="")


@pytest.fixture
def quick_command(
    in_environment: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """`python -m harness *arguments` inside this process, its worker too: no torch is imported anew,
    and no report is rendered."""

    def run(*arguments: str) -> Result:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; so it is put back
        monkeypatch.setattr(sys, "argv", sys.argv)  # likewise
        capfd.readouterr()
        try:
            code = main(arguments, launcher=OneByOne(), summarise=lambda folder: print(f"Report: {folder}"))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        return Result(code, *capfd.readouterr())

    return run


class ForkedWorker:
    """A worker in a process that has torch already, forked from one that does nothing but import it. It works
    and dies as the other does, three seconds sooner."""

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
def run_tiny(in_environment: None, trained: Callable[[Path], None]) -> Callable[..., list[Point]]:
    """Runs one model job of the trained TINY Transformer in a worker process and returns its typed failures.
    With `is_forked` false the worker is started as a user's is."""

    def run(output: Path, *overrides: str, is_forked: bool = True) -> list[Point]:
        forks = is_forked and sys.platform == "linux"  # elsewhere a fork of what has numpy may not be safe
        job = model_job(*TINY, f"output={output}", *overrides)
        trained(output)
        start: StartWorker = ForkedWorker if forks else start_worker
        return run_job(job, line=0, stopping=threading.Event(), start_worker=start)

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
