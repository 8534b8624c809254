"""Obtain a trained model: from its checkpoint, by training it, or with the weights that it came with."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from archs.base import SequenceModel
from archs.implementations import resolve_implementations
from harness.config.build import build_model
from harness.config.identity import training_hash
from harness.record.environment import git_commit
from harness.record.metrics import Metric
from harness.train.checkpoint import load_model, save_model
from harness.train.context import JobContext
from harness.train.errors import Diverged, typed_errors
from harness.train.loop import History, mean_loss, train
from harness.train.settings import training_settings

#: The numbers of a "train" point.
TRAIN_METRICS = (
    Metric(
        name="final_validation_bits_per_byte",
        label="final validation loss",
        unit="bits/byte",
        direction="lower",
        kind="training",
        tolerance=0.05,
        is_headline=True,
    ),
    Metric(
        name="final_validation_loss_nats",
        label="final validation loss",
        unit="nats",
        direction="lower",
        kind="training",
    ),
    Metric(name="num_parameters", label="parameters", unit="", direction="neither", kind="training"),
    Metric(
        name="trained_tokens", label="trained tokens", unit="tokens", direction="neither", kind="training"
    ),
    Metric(name="train_seconds", label="training time", unit="s", direction="lower", kind="training"),
    Metric(name="tokens_per_s", label="throughput", unit="tokens/s", direction="higher", kind="training"),
    Metric(name="learning_rate", label="learning rate", unit="", direction="neither", kind="training"),
    Metric(name="num_skipped_steps", label="skipped steps", unit="", direction="lower", kind="training"),
)
#: The numbers of a "learning_rate_search" point.
SEARCH_METRICS = (
    Metric(
        name="mixture_loss_nats",
        label="loss on the mixture",
        unit="nats",
        direction="lower",
        kind="training",
        is_headline=True,
    ),
    Metric(
        name="validation_loss_nats", label="loss on text", unit="nats", direction="lower", kind="training"
    ),
)


@dataclass(frozen=True, kw_only=True)
class TrainPoint:
    """The "train" point of a model."""

    metrics: dict[str, Any]
    samples: dict[str, Any]
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model that is ready to be measured, and its "train" point."""

    model: SequenceModel
    point: TrainPoint


def obtain(job: JobContext, model_config: dict[str, Any]) -> TrainedModel:
    """Return the model that tasks measure: trained here, loaded, or as it came with its weights.

    Raises Diverged, Failed where an error ended the training, CheckpointError, and ValueError where an
    implementation cannot run here."""
    if job.config.arch.is_pretrained:
        model = new_model(job, model_config)
        return TrainedModel(model=model, point=measure_pretrained(job, model))
    return obtain_trained(job, model_config)


def new_model(job: JobContext, model_config: dict[str, Any]) -> SequenceModel:
    """Return the model that training starts from, drawn from the job's seed, on the job's device.

    Raises ValueError where an implementation cannot run here."""
    torch.manual_seed(job.config.seed)
    model = build_model(model_config).to(job.device)
    resolve_implementations(model, job.device)
    return model


def measure_pretrained(job: JobContext, model: SequenceModel) -> TrainPoint:
    """Return the point of a model that was built with its weights: its loss on the validation batches, and
    null for everything that only training can tell. details["checkpoint"] is where the weights are from.

    Raises Diverged."""
    with typed_errors():
        loss = mean_loss(model, job.stream.validation_batches(), device=job.device, dtype=job.dtype)
    if not math.isfinite(loss):
        raise Diverged(f"validation loss {loss} of a model that was not trained here")
    unknown = ("trained_tokens", "train_seconds", "tokens_per_s", "learning_rate", "num_skipped_steps")
    return TrainPoint(
        metrics={
            "num_parameters": model.num_parameters,
            **dict.fromkeys(unknown),
            "final_validation_loss_nats": loss,
            "final_validation_bits_per_byte": loss / math.log(2) / job.corpus.validation.bytes_per_token,
        },
        samples={},
        details={
            "implementations": resolve_implementations(model, job.device),
            "device": job.device.type,
            "is_pretrained": True,
            "checkpoint": getattr(model, "checkpoint", None),
        },
    )


def obtain_trained(job: JobContext, model_config: dict[str, Any]) -> TrainedModel:
    """Return a model trained at the best rate of a search, or at the architecture's rate.

    The base of Transformer² comes from here too; it is the very model of the base's own job."""
    if job.config.train.search:
        return _search(job, model_config)
    rate = job.config.peak_learning_rate
    assert rate is not None, "a model that is not trained here"
    return _train_at(job, model_config, rate)


def _search(job: JobContext, model_config: dict[str, Any]) -> TrainedModel:
    """Train at every rate of the grid, record each, and return the best model: the one with the lowest loss
    on held-out batches of the training mixture, text and needles."""
    losses: dict[float, float] = {}
    next(iter(job.stream.mixture_batches()))  # raises before the training where it cannot be made
    for rate in job.config.train.search_grid:
        cell = {"learning_rate": rate}
        job.begin_training()
        try:
            loss, text_loss = _losses_at(job, model_config, rate)
        except Diverged as error:
            rest: dict[str, Any] = {"status": "diverged", "reason": str(error)}
        else:
            losses[rate] = loss
            rest = {"metrics": {"mixture_loss_nats": loss, "validation_loss_nats": text_loss}}
        if job.logbook.done(*job.identity, "learning_rate_search", cell) is None:
            job.logbook.write(*job.identity, "learning_rate_search", cell, **rest)
    if not losses:
        raise Diverged("every learning rate of the grid diverged")
    job.begin_training()  # writing the last rate's record has ended the training under way
    return _train_at(job, model_config, min(losses, key=lambda rate: losses[rate]))


def _losses_at(job: JobContext, model_config: dict[str, Any], rate: float) -> tuple[float, float]:
    """Train at one rate; return the losses on the held-out mixture and on the validation text, in nats.

    Raises Diverged."""
    trained = _train_at(job, model_config, rate)
    with typed_errors():
        batches = job.stream.mixture_batches()
        loss = mean_loss(trained.model, batches, device=job.device, dtype=job.dtype)
    if not math.isfinite(loss):
        raise Diverged(f"the loss on held-out batches is {loss}")
    return loss, trained.point.metrics["final_validation_loss_nats"]


def _train_at(job: JobContext, model_config: dict[str, Any], rate: float) -> TrainedModel:
    """Train at one learning rate, or load the model that was trained so. Raises Diverged."""
    name = training_hash(job.config.to_plain(), model_config, rate, job.corpus.content_hash)
    path = checkpoint_path(job, name)
    model = new_model(job, model_config)
    if path.exists():
        return TrainedModel(model=model, point=load_point(job, path, model))
    training = training_settings(job.config.train, rate)
    state_path = path.with_suffix(".training")
    with progress_bar(job, "training", training.num_steps) as bar:

        def on_step(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(step + 1 - bar.n)

        with typed_errors():
            history = train(
                model,
                job.stream,
                training,
                device=job.device,
                dtype=job.dtype,
                state_path=state_path,
                on_step=on_step,
            )
    point = _train_point(job, model, history, rate)
    save_point(path, model, point)
    state_path.unlink(missing_ok=True)
    return TrainedModel(model=model, point=point)


def save_point(path: Path, model: SequenceModel, point: TrainPoint) -> None:
    """Write a checkpoint with its point. Raises CheckpointError."""
    save_model(path, model, dataclasses.asdict(point))


def load_point(job: JobContext, path: Path, model: SequenceModel) -> TrainPoint:
    """Load a checkpoint into `model` and return its point, which says what the model was trained on, not what
    it is loaded on. Print a line where the program has changed since.

    Raises CheckpointError."""
    point = TrainPoint(**load_model(path, model))
    then, now = point.details.get("git_commit"), git_commit()[0]
    if then != now:
        name = job.identity[0]
        print(
            f"{name}: its checkpoint was trained at commit {then or 'unknown'}; this is {now or 'unknown'}."
        )
    return point


def trained_on(job: JobContext, model: SequenceModel) -> dict[str, Any]:
    """Return the machine and the program that train the model, for the details of its point."""
    commit, is_dirty = git_commit()
    return {
        "implementations": resolve_implementations(model, job.device),
        "device": job.device.type,
        "num_threads": torch.get_num_threads(),
        "git_commit": commit,
        "is_dirty": is_dirty,
    }


def checkpoint_path(job: JobContext, name: str) -> Path:
    """Return the file of the checkpoint with this name, a hash."""
    return Path(job.config.output) / "checkpoints" / f"{name}.safetensors"


def progress_bar(job: JobContext, what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"{job.identity[0]}: {what}", unit="step", file=sys.stderr, disable=None)


def _train_point(job: JobContext, model: SequenceModel, history: History, rate: float) -> TrainPoint:
    loss = history.validation_losses_nats[-1]
    return TrainPoint(
        metrics={
            "num_parameters": model.num_parameters,
            "trained_tokens": history.trained_tokens,
            "train_seconds": history.train_seconds,
            "tokens_per_s": history.trained_tokens / history.train_seconds,
            "final_validation_loss_nats": loss,
            "final_validation_bits_per_byte": loss / math.log(2) / job.corpus.validation.bytes_per_token,
            "learning_rate": rate,
            "num_skipped_steps": len(history.skipped_steps),
        },
        samples={
            "step": history.steps,
            "loss_nats": history.losses_nats,
            "validation_step": history.validation_steps,
            "validation_loss_nats": history.validation_losses_nats,
        },
        details=trained_on(job, model),
    )
