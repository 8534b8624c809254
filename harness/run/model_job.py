"""The quality job: train or load one model, then every task that measures a model alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from archs.base import SequenceModel
from harness.config.build import instantiate
from harness.config.match import is_published, matched_model_config, mismatch_text
from harness.config.schema import JobConfig
from harness.record.outcomes import outcome
from harness.record.writer import RecordWriter
from harness.run.cost_card import card, meta_model
from harness.train.adapted_model import obtain_experts
from harness.train.context import JobContext
from harness.train.errors import Diverged, Failed
from harness.train.loop import autocast
from harness.train.trained_model import obtain
from tasks.base import Task, TaskInputs


def run(
    spec: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    make_logbook: Callable[[str | None], RecordWriter],
) -> None:
    """Trains or loads the spec's model and measures what is not yet measured."""
    config: JobConfig = spec["configs"][0]
    model_config, mismatch = matched_model_config(config)
    # What only this architecture can be asked goes with the chosen tasks: task=[] trains, no more.
    own_tasks = config.arch.tasks if config.tasks else {}
    tasks = [instantiate(task) for task in [*config.tasks.values(), *own_tasks.values()]]
    tasks = [task for task in tasks if isinstance(task, Task)]
    if spec["give_up"] is not None:
        _give_up(JobContext(config, device, dtype, None, None, make_logbook(None)), tasks, **spec["give_up"])
        return
    corpus = instantiate(config.data.corpus)
    stream = instantiate({**config.train.stream, "_partial_": True})(corpus=corpus)
    inputs = TaskInputs(
        corpus=corpus,
        tokenizer=corpus.tokenizer,
        device=device,
        seed=config.seed,
        trained_lengths_tokens=_trained_lengths_tokens(config, stream),
    )
    for task in tasks:  # a mistake in the input shows before an hour of training
        task.prepare(inputs)
    job = JobContext(config, device, dtype, corpus, stream, make_logbook(corpus.content_hash))
    if _is_done(job, tasks):
        print(f"{spec['job']}: everything is measured already.")
        return
    _measure_cost(job)
    obtained = _obtain_model(job, model_config, mismatch)
    if isinstance(obtained, Failed):
        _give_up(job, tasks, status=obtained.status, reason=obtained.reason)
        return
    _measure_tasks(job, obtained, tasks)


def _trained_lengths_tokens(config: JobConfig, stream: Any) -> tuple[int, ...]:
    """Empty where the model was not trained here: nobody has said what it was trained on."""
    return () if config.arch.is_pretrained else tuple(stream.trained_lengths_tokens)


def _is_done(job: JobContext, tasks: list[Task]) -> bool:
    done = [job.logbook.done(*job.identity, name, {}) for name in ("train", "cost")]
    done += [job.logbook.done(*job.identity, task.name, cell) for task in tasks for cell in task.cells()]
    return all(done)


def _give_up(job: JobContext, tasks: list[Task], *, status: str, reason: str) -> None:
    """Training, if it has no record yet, and every cell that is not measured become typed records."""
    if job.logbook.done(*job.identity, "train", {}) is None:
        job.logbook.write(*job.identity, "train", {}, status=status, reason=reason)
    for task in tasks:
        for cell in task.cells():
            if job.logbook.done(*job.identity, task.name, cell) is None:
                job.logbook.write(*job.identity, task.name, cell, status=status, reason=reason)


def _measure_cost(job: JobContext) -> None:
    if job.logbook.done(*job.identity, "cost", {}) is None:
        model, _ = meta_model(job.config)
        values = card(model, job.config.dtype)
        metrics = {"num_parameters": values.pop("num_parameters")}
        job.logbook.write(*job.identity, "cost", {}, metrics=metrics, details=values)


def _obtain_model(
    job: JobContext, model_config: dict[str, Any], mismatch: float | None
) -> SequenceModel | Failed:
    """Return the trained model, from its checkpoint where there is one, or the reason why there is none."""
    config = job.config
    if mismatch is not None:
        print(f"{config.arch.name}: {mismatch_text(mismatch, is_published=is_published(config))}")
    previous = job.logbook.done(*job.identity, "train", {})
    if previous is not None and previous.status != "ok":
        return Failed(previous.status, f"training: {previous.reason}")
    job.begin_training()
    try:
        has_experts = config.arch.post_training is not None
        trained = (obtain_experts if has_experts else obtain)(job, model_config)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, Diverged):
            status, reason = "diverged", str(error)
        elif isinstance(error, Failed):
            status, reason = error.status, error.reason
        else:
            status, reason = outcome(error)
        job.logbook.write(*job.identity, "train", {}, status=status, reason=reason)
        return Failed(status, f"training: {reason}")
    if previous is None:
        point = trained.point
        details = point.details | {
            "dtype": config.dtype,
            "parameter_mismatch": mismatch,
            "trained_lengths_tokens": list(_trained_lengths_tokens(config, job.stream)),
            "data": job.corpus.description(),
        }
        job.logbook.write(
            *job.identity, "train", {}, metrics=point.metrics, samples=point.samples, details=details
        )
    return trained.model


def _measure_tasks(job: JobContext, model: SequenceModel, tasks: list[Task]) -> None:
    arch = job.identity[0]
    todo = [(task, cell) for task in tasks for cell in task.cells()]
    todo = [(task, cell) for task, cell in todo if job.logbook.done(*job.identity, task.name, cell) is None]
    model.eval()
    for task, cell in tqdm(todo, desc=f"{arch}: tasks", unit="cell", file=sys.stderr, disable=None):
        job.logbook.begin(*job.identity, task.name, cell)
        try:
            with torch.no_grad(), autocast(job.device, job.dtype):
                measured = task.measure(model, cell)
            task.require_declared(measured)
        except Exception as error:  # whatever it was, the other cells are worth having
            status, reason = outcome(error)
            job.logbook.write(*job.identity, task.name, cell, status=status, reason=reason)
            continue
        broken = [
            n for n, value in measured.metrics.items() if value is not None and not math.isfinite(value)
        ]
        if broken:
            reason = f"the model's outputs are not finite: no number for {', '.join(broken)}"
            job.logbook.write(*job.identity, task.name, cell, status="diverged", reason=reason)
            continue
        job.logbook.write(
            *job.identity,
            task.name,
            cell,
            metrics=measured.metrics,
            samples=measured.samples,
            details=measured.details,
        )
