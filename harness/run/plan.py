"""From one Hydra job to the processes that do it, and from a finished sweep to its report."""

from __future__ import annotations

import shlex
import sys
import threading
from pathlib import Path
from typing import Any

import hydra
import hydra.utils
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from harness.config.compose import check_model_overrides, resolve
from harness.config.identity import NOT_RESULT_KEYS
from harness.config.schema import JobConfig, parse_job, parse_shared
from harness.config.targets import check_targets
from harness.record.schema import Point, content_hash
from harness.run import supervision as jobs
from harness.run.launcher import LaunchedJob, Launcher
from harness.run.local import LocalLauncher
from harness.run.progress import tell


def jobs_of(config: DictConfig) -> list[LaunchedJob]:
    """Return the jobs that `config` describes, checked against the schema. Nothing runs yet.

    With an architecture: training and the quality tasks, num_workers such jobs of a sweep at once. Without
    one: the latency of the `interleave` list. Latency is measured alone; where the sweep has no latency job,
    every job measures its own, and all run alone.
    """
    check_model_overrides(config, HydraConfig.get().overrides.task)
    values, is_local = plain(config), _is_local(config)
    if values.get("arch") is None:
        shared = parse_shared(values)
        if not shared.interleave:
            raise ValueError("A job without an architecture is the latency job and needs interleave=[...].")
        parts = [("latency", [job_config(_with_arch(name)) for name in shared.interleave])]
    else:
        job = parse_job(values)
        shared, parts = job, [("quality", [job])]
        if job.interleave is None and "latency" in job.tasks:
            parts.append(("latency", [job]))
    num_at_once = shared.num_workers if is_local else 1
    if parts[-1][0] == "latency" or not _is_sweep_here():
        num_at_once = 1
    change = {"num_workers": num_at_once}
    parts = [(kind, [one.model_copy(update=change) for one in configs]) for kind, configs in parts]
    return [launched_job(*part) for part in parts]


def _is_local(config: DictConfig) -> bool:
    """Return whether jobs run on this machine, and so share it."""
    return issubclass(hydra.utils.get_class(config.launcher._target_), LocalLauncher)


def _is_sweep_here() -> bool:
    """Return whether the command is a sweep: a single job has the machine to itself."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as JSON values, with a fixed output path."""
    value = resolve(config)
    value["output"] = str(Path(value["output"]).absolute())
    value.pop("launcher")  # where a job runs is no part of it
    return value


def make_launcher(config: DictConfig) -> Launcher:
    """Builds the launcher of `config.launcher`. Raises ValueError where it cannot be used here."""
    settings = resolve(config)["launcher"]
    check_targets(settings, "launcher")
    launcher: Launcher = hydra.utils.get_class(settings.pop("_target_"))(**settings)
    return launcher


def job_config(config: DictConfig) -> JobConfig:
    """Return the typed configuration of one job. Raises ValueError with one sentence."""
    return parse_job(plain(config))


def command_line() -> str:
    """What the user typed, to be typed again."""
    return shlex.join(["python", "-m", "harness", *sys.argv[1:]])


def _with_arch(name: str) -> DictConfig:
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("arch=")]
    return hydra.compose("config", [*overrides, f"arch={name}"])


def run_process(kind: str, configs: list[JobConfig], *, line: int, stopping: threading.Event) -> list[Point]:
    """Runs one job, "quality" or "latency", in a process of its own and returns its typed failures."""
    job = launched_job(kind, configs)
    tell(f"-- {job.name}")
    return jobs.run_job(job.spec, job.output, job.timeout_s, line=line, stopping=stopping)


def launched_job(kind: str, configs: list[JobConfig]) -> LaunchedJob:
    """Describes one job, "quality" or "latency", as a launcher runs it."""
    first = configs[0]
    name = first.arch.name if kind == "quality" else "latency"
    if kind == "latency" and len(configs) == 1:
        name = f"latency-{first.arch.name}"
    ignored = [k for k in NOT_RESULT_KEYS if kind == "quality" or k != "num_threads"]
    values = [one.to_plain() for one in configs]
    kept = [{k: v for k, v in one.items() if k not in ignored} for one in values]
    spec = {
        "kind": kind,
        "job": f"{name}-{first.size.name}-seed{first.seed}",
        "configs": values,
        "config_hash": content_hash(kept),
        "command": command_line(),
    }
    return LaunchedJob(
        spec=spec,
        output=Path(first.output),
        timeout_s=first.job_timeout_s,
        is_timing=kind == "latency",
    )
