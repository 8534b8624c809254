"""From a command line to its jobs: composed, checked and counted before the first one starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import hydra.utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from harness.config.compose import check_model_overrides, resolve
from harness.config.schema import JobConfig, SweepConfig, parse, parse_job
from harness.config.targets import check_targets
from harness.run.job import JobSpec
from harness.run.launcher import Launcher

#: A key of the configuration, and the list that stands for several of it.
LISTS = {"size": "sizes", "arch": "archs", "seed": "seeds"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a plan must know of a configuration, from its classes.

    is_trained: it has a model job, which its timing tasks alone do not need.
    is_timed:   timing tasks are among its tasks.
    is_on_gpu:  it runs on a GPU of this machine.
    """

    is_trained: bool
    is_timed: bool
    is_on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The jobs of a command, in their order: models, then timing."""

    jobs: tuple[JobSpec, ...]

    @property
    def outputs(self) -> list[Path]:
        """The folders of results."""
        return list(dict.fromkeys(job.output for job in self.jobs))


def sweep_config(config: DictConfig) -> SweepConfig:
    """Return the keys of the configuration that are no part of a job. Raises ValueError with one sentence."""
    values = resolve(config)
    return parse(SweepConfig, {key: values[key] for key in SweepConfig.model_fields if key in values})


def job_configs(config: DictConfig, overrides: Sequence[str]) -> list[JobConfig]:
    """Return the typed configuration of each architecture, size and seed of a composed configuration.

    overrides: what it was composed from. One of `arch`, `size` and `seed` among them holds over its list in
               an experiment.
    Raises ValueError with one sentence."""
    given = {
        o.key_or_group for o in OverridesParser.create().parse_overrides(list(overrides)) if not o.package
    }
    if config.get("arch") is None:
        raise ValueError(
            "arch=[] names no architecture; write arch=NAME for one, archs=[NAME,NAME] or lineup=NAME for "
            "several, which are timed in turn by a job of their own."
        )
    lists = sweep_config(config)
    choices: list[list[str]] = []
    for key, several in LISTS.items():
        chosen = getattr(lists, several)
        again = given & ({several, "lineup"} if key == "arch" else {several})
        if key in given and again and chosen is not None:
            raise ValueError(f"{key}=... and {min(again)}=... choose twice; write one of them.")
        choices.append(
            [] if chosen is None or key in given else [f"{key}={v}" for v in dict.fromkeys(chosen)]
        )
    if not any(choices):
        return [_job_config(config, overrides)]
    found = []
    for chosen in product(*(several or [""] for several in choices)):
        own = [*overrides, *filter(None, chosen)]
        found.append(_job_config(hydra.compose("config", own), own))
    return found


def _job_config(config: DictConfig, overrides: Sequence[str]) -> JobConfig:
    check_model_overrides(config, overrides)
    values = resolve(config)
    values["output"] = str(Path(values["output"]).absolute())
    for key in ("launcher", *SweepConfig.model_fields):  # no part of a job
        values.pop(key, None)
    return parse_job(values)


def make_launcher(config: DictConfig) -> Launcher:
    """Return the launcher of `config.launcher`. Raises ValueError where it cannot be used here."""
    settings = resolve(config)["launcher"]
    check_targets(settings, "launcher")
    launcher: Launcher = hydra.utils.get_class(settings.pop("_target_"))(**settings)
    return launcher


def make_plan(configs: Sequence[JobConfig], *, is_local: bool, command: str) -> Plan:
    """Return the checked jobs of the configurations: a model job for each, then timing jobs.

    A timing job times the architectures whose configurations agree in all else, in turn.
    is_local: jobs share this machine. Models that train at once share its threads; where the command has one
              configuration, its job has them all.
    Raises ValueError where a configuration cannot be used."""
    checked = list(zip(configs, _checked(configs, is_local), strict=True))
    jobs = [
        JobSpec(
            is_timing=False,
            configs=(config,),
            command=command,
            num_at_once=_num_workers(config, facts) if is_local and len(configs) > 1 else 1,
        )
        for config, facts in checked
        if facts.is_trained
    ]
    groups: list[tuple[dict[str, Any], dict[str, JobConfig]]] = []
    for config in (config for config, facts in checked if facts.is_timed):
        rest = {key: value for key, value in config.to_plain().items() if key != "arch"}
        name = config.arch.name
        group = next((group for shared, group in groups if shared == rest and name not in group), None)
        if group is None:
            groups.append((rest, {name: config}))
        else:
            group[name] = config
    jobs += [JobSpec(is_timing=True, configs=tuple(group.values()), command=command) for _, group in groups]
    return Plan(jobs=tuple(jobs))


def _num_workers(config: JobConfig, facts: Facts) -> int:
    if config.num_workers != "auto":
        return config.num_workers
    if facts.is_on_gpu:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked(configs: Sequence[JobConfig], is_local: bool) -> list[Facts]:
    """Check the configurations with their classes, in another process unless torch is in this one already."""
    request: dict[str, Any] = {"configs": [config.to_plain() for config in configs], "is_local": is_local}
    if "torch" in sys.modules:
        from harness.run.check import check

        return [Facts(**facts) for facts in check(**request)]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is the parent's to handle
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.run.check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        text, _ = process.communicate(json.dumps(request))
    finally:
        process.kill()
    if process.returncode != 0:
        raise ValueError(f"The jobs cannot be checked: that process ended with {process.returncode}.")
    answer = json.loads(text.splitlines()[-1])
    if "mistake" in answer:
        raise ValueError(answer["mistake"])
    return [Facts(**facts) for facts in answer["facts"]]
