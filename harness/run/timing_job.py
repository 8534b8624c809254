"""The latency job: several architectures in one process, measured in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
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
from harness.record.outcomes import outcome
from harness.record.writer import RecordWriter
from harness.train.errors import CheckpointError

#: The calibration: a float32 matrix product of this width, the yardstick that regress divides by.
CALIBRATION_WIDTH = 512


def run(
    spec: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    make_logbook: Callable[[str | None], RecordWriter],
) -> None:
    """Measures every cell of every interleaved task for every configuration of the spec."""
    configs: dict[str, JobConfig] = {config.arch.name: config for config in spec["configs"]}
    first = spec["configs"][0]
    size, seed = first.size.name, first.seed
    tasks = [instantiate(task) for task in first.tasks.values()]
    tasks = [task for task in tasks if getattr(task, "is_interleaved", False)]
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
        for task in tasks:
            for cell in task.cells():
                due = {
                    n: m for n, m in models.items() if logbook.done(n, size, seed, task.name, cell) is None
                }

                def on_turn(name: str, task: Any = task, cell: Any = cell) -> None:
                    logbook.begin(name, size, seed, task.name, cell)

                for name, result in _outcomes(task, due, cell, device, on_turn):
                    found = details[name]
                    if isinstance(result, tuple):
                        rest: dict[str, Any] = {"status": result[0], "reason": result[1]}
                    else:
                        rest = {"metrics": result.metrics, "samples": result.samples}
                        found = found | result.details
                    logbook.write(name, size, seed, task.name, cell, **rest, details=found)
                bar.update()


def _outcomes(
    task: Any,
    models: Mapping[str, SequenceModel],
    cell: dict[str, Any],
    device: torch.device,
    on_turn: Callable[[str], None],
) -> Iterator[tuple[str, Any]]:
    """As `task.measure_interleaved`; but an error, whatever its class, is the outcome of the model whose
    turn it was, and the cell begins anew for those that are left."""
    left = dict(models)
    while left:
        turn: list[str] = []  # empty until on_turn is done: an error of its own is nobody's

        def told(name: str, turn: list[str] = turn) -> None:
            turn.clear()
            on_turn(name)
            turn.append(name)

        results = task.measure_interleaved(dict(left), cell, device, told)
        is_cut = False
        while not is_cut:
            try:
                name, result = next(results)
            except StopIteration:
                return
            except Exception as error:
                if isinstance(error, CheckpointError) or not turn or turn[0] not in left:
                    raise
                name, result, is_cut = turn[0], outcome(error), True
            left.pop(name)
            yield name, result


def _give_up(
    logbook: RecordWriter, name: str, size: str, seed: int, tasks: list[Any], *, status: str, reason: str
) -> None:
    """Every cell of an architecture that is not measured becomes a typed record."""
    for task in tasks:
        for cell in task.cells():
            if logbook.done(name, size, seed, task.name, cell) is None:
                logbook.write(name, size, seed, task.name, cell, status=status, reason=reason)


def _random_model(
    config: JobConfig, device: torch.device, dtype: torch.dtype
) -> tuple[SequenceModel, dict[str, Any]]:
    """A seeded, untrained model (weights do not change its speed), drawn where it runs, and what its points
    say of it."""
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
    """Times the matrix product that other times of this run are divided by."""
    if logbook.done("", size, seed, "calibration", {}) is not None:
        return
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(CALIBRATION_WIDTH, CALIBRATION_WIDTH, generator=generator).to(device)
    times = [time_call_ms(lambda: matrix @ matrix, device) for _ in range(60)][10:]
    metrics: dict[str, float | int | None] = {"matmul_ms": percentile(times, 0.5)}
    logbook.write("", size, seed, "calibration", {}, metrics=metrics, samples={"time_ms": times})
