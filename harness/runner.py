"""From one Hydra job to the processes that do it, and from a finished sweep to its report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from harness import jobs
from harness.check import check_root
from harness.config_dir import check_model_overrides, resolve
from harness.record import Point, content_hash

#: Where and how a job runs; what it measures does not depend on them, but for times on num_threads.
NOT_RESULT_KEYS = ("output", "experiment_name", "num_threads", "job_timeout_s", "retry_failed", "interleave")


def run(config: DictConfig) -> list[Point]:
    """Runs the job that `config` describes and returns its typed failures.

    With an architecture: training and the quality tasks, and, unless the sweep has a latency job of
    its own, the architecture's latency. Without one: the latency of the `interleave` list.
    """
    check_model_overrides(config, HydraConfig.get().overrides.task)
    resolved = plain(config)
    check_root(resolved)
    output = Path(resolved["output"])
    failures: list[Point] = []
    arch, interleave = resolved.get("arch"), resolved["interleave"]
    if arch is not None:
        failures += run_process("quality", [resolved], output)
        if interleave is None and "latency" in resolved["tasks"]:
            failures += run_process("latency", [resolved], output)
    elif interleave:
        failures += run_process("latency", [plain(_with_arch(name)) for name in interleave], output)
    else:
        raise ValueError("A job without an architecture is the latency job and needs interleave=[...].")
    return failures


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as JSON values, with a fixed output path."""
    value = resolve(config)
    value["output"] = str(Path(value["output"]).absolute())
    return value


def command_line() -> str:
    """What the user typed, to be typed again."""
    return shlex.join(["python", "-m", "harness", *sys.argv[1:]])


def _with_arch(name: str) -> DictConfig:
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("arch=")]
    return hydra.compose("config", [*overrides, f"arch={name}"])


def run_process(kind: str, configs: list[dict[str, Any]], output: Path) -> list[Point]:
    first = configs[0]
    name = first["arch"]["name"] if kind == "quality" else "latency"
    if kind == "latency" and len(configs) == 1:
        name = f"latency-{first['arch']['name']}"
    ignored = [k for k in NOT_RESULT_KEYS if kind == "quality" or k != "num_threads"]
    kept = [{k: v for k, v in c.items() if k not in ignored} for c in configs]
    spec = {
        "kind": kind,
        "job": f"{name}-{first['size']['name']}-seed{first['seed']}",
        "configs": configs,
        "config_hash": content_hash(kept),
        "command": command_line(),
    }
    print(f"-- {spec['job']}", file=sys.stderr, flush=True)
    return jobs.run_job(spec, output, first["job_timeout_s"])
