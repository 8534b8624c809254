"""A trained model: from the checkpoint of its hash, or by training it; or one that came trained."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from archs.base import SequenceModel
from archs.implementations import resolve_implementations
from harness.config.build import build_model
from harness.config.identity import training_hash
from harness.record.environment import git_commit
from harness.train.checkpoint import load_model, save_model
from harness.train.context import Job
from harness.train.errors import Diverged, typed_errors
from harness.train.loop import History, mean_loss, train
from harness.train.settings import training_settings

#: What a "train" point says: metrics, samples, details.
TrainPoint = dict[str, Any]


def obtain(job: Job, model: SequenceModel, model_config: dict[str, Any]) -> TrainPoint:
    """Leaves `model` trained and returns what its "train" point says; one that came with its weights is left
    as it is. Raises Diverged, or Failed where an error ended the training, and CheckpointError."""
    if job.config.arch.is_pretrained:
        return measure_pretrained(job, model)
    return obtain_trained(job, model, model_config)


def measure_pretrained(job: Job, model: SequenceModel) -> TrainPoint:
    """A model that was built with its weights: its loss on the validation batches, and null for all that
    training would say. details["checkpoint"] is where the weights are from. Raises Diverged."""
    with typed_errors():
        loss = mean_loss(model, job.stream.validation_batches(), device=job.device, dtype=job.dtype)
    if not math.isfinite(loss):
        raise Diverged(f"validation loss {loss} of a model that was not trained here")
    unknown = ("trained_tokens", "train_seconds", "tokens_per_s", "learning_rate", "num_skipped_steps")
    return {
        "metrics": {
            "num_parameters": model.num_parameters,
            **dict.fromkeys(unknown),
            "final_validation_loss_nats": loss,
            "final_validation_bits_per_byte": loss / math.log(2) / job.corpus.validation.bytes_per_token,
        },
        "samples": {},
        "details": {
            "implementations": resolve_implementations(model, job.device),
            "device": job.device.type,
            "is_pretrained": True,
            "checkpoint": getattr(model, "checkpoint", None),
        },
    }


def obtain_trained(job: Job, model: SequenceModel, model_config: dict[str, Any]) -> TrainPoint:
    """At the best rate of a search, or at the architecture's: Transformer²'s base comes here too, and so
    is the very model of the base's own job."""
    if job.config.train.search:
        return _search(job, model, model_config)
    rate = job.config.peak_learning_rate
    assert rate is not None, "a model that is not trained here"
    return _train_at(job, model, model_config, rate)


def _search(job: Job, model: SequenceModel, model_config: dict[str, Any]) -> TrainPoint:
    """Trains at every rate of the grid, records each, and loads the best: the lowest loss on held-out
    batches of the mixture that is trained on, text and needles."""
    outcomes: dict[float, float] = {}
    next(iter(job.stream.mixture_batches()))  # raises before the training where it cannot be made
    for rate in job.config.train.search_grid:
        cell = {"learning_rate": rate}
        job.begin_training()
        try:
            point = _train_at(job, model, model_config, rate)
            with typed_errors():
                batches = job.stream.mixture_batches()
                loss = mean_loss(model, batches, device=job.device, dtype=job.dtype)
            if not math.isfinite(loss):
                raise Diverged(f"the loss on held-out batches is {loss}")
        except Diverged as error:
            rest: dict[str, Any] = {"status": "diverged", "reason": str(error)}
        else:
            outcomes[rate] = loss
            text_loss = point["metrics"]["final_validation_loss_nats"]
            rest = {"metrics": {"mixture_loss_nats": loss, "validation_loss_nats": text_loss}}
        if job.logbook.done(*job.identity, "learning_rate_search", cell) is None:
            job.logbook.write(*job.identity, "learning_rate_search", cell, **rest)
    if not outcomes:
        raise Diverged("every learning rate of the grid diverged")
    job.begin_training()  # writing the last rate's record has ended what was under way
    best = min(outcomes, key=lambda rate: outcomes[rate])
    return _train_at(job, model, model_config, best)


def _train_at(job: Job, model: SequenceModel, model_config: dict[str, Any], rate: float) -> TrainPoint:
    """Trains at one learning rate, or loads what was trained so. Raises Diverged."""
    path = checkpoint_path(
        job, training_hash(job.config.to_plain(), model_config, rate, job.corpus.content_hash)
    )
    if path.exists():
        return load_point(job, path, model)
    training = training_settings(job.config.train, rate)
    torch.manual_seed(job.config.seed)
    model.load_state_dict(build_model(model_config).state_dict())
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
    save_model(path, model, point)
    state_path.unlink(missing_ok=True)
    return point


def load_point(job: Job, path: Path, model: SequenceModel) -> TrainPoint:
    """The checkpoint's point, which says what the model was trained on, not what it is loaded on; says so
    where the program has changed in between."""
    point = load_model(path, model)
    then, now = point["details"].get("git_commit"), git_commit()[0]
    if then != now:
        name = job.identity[0]
        print(
            f"{name}: its checkpoint was trained at commit {then or 'unknown'}; this is {now or 'unknown'}."
        )
    return point


def trained_on(job: Job, model: SequenceModel) -> dict[str, Any]:
    """What trains the model, kept in its checkpoint."""
    commit, is_dirty = git_commit()
    return {
        "implementations": resolve_implementations(model, job.device),
        "device": job.device.type,
        "num_threads": torch.get_num_threads(),
        "git_commit": commit,
        "is_dirty": is_dirty,
    }


def checkpoint_path(job: Job, name: str) -> Path:
    return Path(job.config.output) / "checkpoints" / f"{name}.safetensors"


def progress_bar(job: Job, what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"{job.identity[0]}: {what}", unit="step", file=sys.stderr, disable=None)


def _train_point(job: Job, model: SequenceModel, history: History, rate: float) -> TrainPoint:
    loss = history.validation_losses_nats[-1]
    return {
        "metrics": {
            "num_parameters": model.num_parameters,
            "trained_tokens": history.trained_tokens,
            "train_seconds": history.train_seconds,
            "tokens_per_s": history.trained_tokens / history.train_seconds,
            "final_validation_loss_nats": loss,
            "final_validation_bits_per_byte": loss / math.log(2) / job.corpus.validation.bytes_per_token,
            "learning_rate": rate,
            "num_skipped_steps": len(history.skipped_steps),
        },
        "samples": {
            "step": history.steps,
            "loss_nats": history.losses_nats,
            "validation_step": history.validation_steps,
            "validation_loss_nats": history.validation_losses_nats,
        },
        "details": trained_on(job, model),
    }
