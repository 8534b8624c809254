"""The timing job: several architectures in one process, measured in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from archs.base import SequenceModel
from archs.implementations import resolve_implementations
from harness.config.build import build_model, instantiate
from harness.config.match import matched_model_config
from harness.config.schema import JobConfig
from harness.measure.statistics import percentile
from harness.measure.time import time_call_ms
from harness.measure.turns import Failure, TimingRun
from harness.record.metrics import Metric
from harness.record.outcomes import outcome
from harness.record.writer import RecordWriter
from tasks.base import Measurement, TimingTask

#: The calibration: a float32 matrix product of this width, the yardstick that regress divides by.
CALIBRATION_WIDTH = 512
#: The number of the "calibration" point.
CALIBRATION_METRICS = (
    Metric(name="matmul_ms", label="matrix product", unit="ms", direction="lower", kind="cost"),
)


def run(
    spec: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    make_logbook: Callable[[str | None], RecordWriter],
) -> None:
    """Measure every cell of every timing task for the model of every configuration of the spec."""
    configs: dict[str, JobConfig] = {config.arch.name: config for config in spec["configs"]}
    first = spec["configs"][0]
    size, seed = first.size.name, first.seed
    tasks = [instantiate(task) for task in first.tasks.values()]
    tasks = [task for task in tasks if isinstance(task, TimingTask)]
    logbook = make_logbook(None)
    if spec["give_up"] is not None:
        for name in configs:
            _give_up(logbook, name, size, seed, tasks, **spec["give_up"])
        return
    models, details = {}, {}
    for name, config in configs.items():
        try:
            models[name], details[name] = _random_model(config, device, dtype)
        except ValueError:
            raise
        except Exception as error:  # the other architectures are worth having
            status, reason = outcome(error)
            _give_up(logbook, name, size, seed, tasks, status=status, reason=reason)
    num_cells = sum(len(task.cells()) for task in tasks)
    with tqdm(total=num_cells, desc=spec["job"], unit="cell", file=sys.stderr, disable=None) as bar:
        _calibrate(logbook, size, seed, device)
        timing_run = TimingRun(device)
        for task in tasks:
            for cell in task.cells():
                due = {
                    n: m for n, m in models.items() if logbook.done(n, size, seed, task.name, cell) is None
                }

                def on_turn(name: str, task: TimingTask = task, cell: Any = cell) -> None:
                    logbook.begin(name, size, seed, task.name, cell)

                for name, result in task.measure_in_turn(due, cell, timing_run, on_turn):
                    result = _checked(task, result)
                    if isinstance(result, Failure):
                        rest: dict[str, Any] = result._asdict() | {"details": details[name]}
                    else:
                        rest = {"metrics": result.metrics, "samples": result.samples}
                        rest["details"] = details[name] | result.details
                    logbook.write(name, size, seed, task.name, cell, **rest)
                bar.update()


def _checked(task: TimingTask, result: Measurement | Failure) -> Measurement | Failure:
    """Return the result; a measurement whose numbers are not declared is a failure."""
    try:
        if isinstance(result, Measurement):
            task.require_declared(result)
    except ValueError as error:
        return Failure(*outcome(error))
    return result


def _give_up(
    logbook: RecordWriter,
    name: str,
    size: str,
    seed: int,
    tasks: list[TimingTask],
    *,
    status: str,
    reason: str,
) -> None:
    """Write a typed record for every cell of an architecture that has none."""
    for task in tasks:
        for cell in task.cells():
            if logbook.done(name, size, seed, task.name, cell) is None:
                logbook.write(name, size, seed, task.name, cell, status=status, reason=reason)


def _random_model(
    config: JobConfig, device: torch.device, dtype: torch.dtype
) -> tuple[SequenceModel, dict[str, Any]]:
    """Return a seeded, untrained model, drawn on the device, and the details of its points.

    Weights do not change its speed."""
    torch.manual_seed(config.seed)
    model_config, _ = matched_model_config(config)
    model = build_model(model_config, device).to(dtype=dtype).eval()
    return model, {
        "implementations": resolve_implementations(model, device),
        "display_name": config.arch.display_name,
        "colour": config.arch.colour,
        "dtype": config.dtype,
        "num_parameters": model.num_parameters,
    }


def _calibrate(logbook: RecordWriter, size: str, seed: int, device: torch.device) -> None:
    """Time the matrix product that `make regress` divides the other times of this job by."""
    if logbook.done("", size, seed, "calibration", {}) is not None:
        return
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(CALIBRATION_WIDTH, CALIBRATION_WIDTH, generator=generator).to(device)
    times = [time_call_ms(lambda: matrix @ matrix, device) for _ in range(60)][10:]
    metrics: dict[str, float | int | None] = {"matmul_ms": percentile(times, 0.5)}
    logbook.write("", size, seed, "calibration", {}, metrics=metrics, samples={"time_ms": times})
