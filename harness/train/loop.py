"""The only training loop: AdamW, linear warm-up, cosine decay, the same batches for every model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from archs.base import SequenceModel
from harness.train.checkpoint import load_training_state, save_training_state
from harness.train.errors import Diverged
from harness.train.settings import Training

Batch = tuple[Tensor, Tensor, Tensor]  # tokens, targets, weights: (B, T) each


class BatchSource(Protocol):
    """The batches of training: a pure function of the step, so that every architecture sees the same."""

    def batch(self, step: int) -> Batch: ...

    def validation_batches(self) -> Iterable[Batch]: ...

    def mixture_batches(self) -> Iterable[Batch]: ...


@runtime_checkable
class ProgressListener(Protocol):
    """A module that is told how far training is (TTT-MLP warms its inner learning rate)."""

    def set_training_progress(self, fraction: float) -> None: ...


@dataclass
class History:
    """The losses and totals of a training run; steps and losses are lists of equal length."""

    steps: list[int] = field(default_factory=list)
    losses_nats: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses_nats: list[float] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    trained_tokens: int = 0
    train_seconds: float = 0.0


def train(
    model: SequenceModel,
    source: BatchSource,
    settings: Training,
    *,
    device: torch.device,
    dtype: torch.dtype,
    state_path: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> History:
    """Train in place and return the history. Continue from `state_path` if it exists.

    A ProgressListener is given the fraction of the outer warm-up that is over. train_seconds counts steps
    without validation. Raises Diverged where the loss or gradient is too often not finite.
    """
    optimizer = make_optimizer(model, settings)
    history, first_step = History(), 0
    if state_path is not None and state_path.exists():
        first_step, history = load_training_state(state_path, model, optimizer, History)
    listeners = [m for m in model.modules() if isinstance(m, ProgressListener)]
    warmup_steps = max(1, round(settings.warmup_fraction * settings.num_steps))
    model.train()
    last_save = time.monotonic()
    for step in range(first_step, settings.num_steps):
        started = time.perf_counter()
        for listener in listeners:
            listener.set_training_progress(min(1.0, (step + 1) / warmup_steps))
        tokens, targets, weights = (t.to(device, non_blocking=True) for t in source.batch(step))
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        optimizer.zero_grad(set_to_none=True)
        value = add_gradients(
            model, (tokens, targets, weights), settings.micro_batch_tokens, device=device, dtype=dtype
        )
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip).item()
        if math.isfinite(value) and math.isfinite(norm):
            optimizer.step()
        else:
            history.skipped_steps.append(step)
            if len(history.skipped_steps) > settings.max_skipped_steps:
                raise Diverged(
                    f"loss {value} and gradient norm {norm} at step {step}, "
                    f"after {settings.max_skipped_steps} skipped steps"
                )
        history.train_seconds += time.perf_counter() - started
        history.trained_tokens += tokens.numel()
        history.steps.append(step)
        history.losses_nats.append(value)
        is_last = step == settings.num_steps - 1
        if is_last or (step + 1) % settings.validation_interval_steps == 0:
            history.validation_steps.append(step + 1)
            validation = mean_loss(model, source.validation_batches(), device=device, dtype=dtype)
            history.validation_losses_nats.append(validation)
            if is_last and not math.isfinite(validation):
                raise Diverged(f"validation loss {validation} after the last step, step {step}")
        on_step(step, value)
        if state_path is not None and time.monotonic() - last_save > settings.checkpoint_interval_s:
            save_training_state(state_path, model, optimizer, step + 1, history)
            last_save = time.monotonic()
    for listener in listeners:
        listener.set_training_progress(1.0)
    model.eval()
    return history


def add_gradients(
    model: SequenceModel,
    batch: Batch,
    micro_batch_tokens: int | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Return the batch's weighted mean loss in nats; add its gradients to the parameters'.

    Row by row group of `micro_batch_tokens`: each group's mean counts as much as its weights do."""
    num_rows, num_tokens = batch[0].shape
    group = num_rows if micro_batch_tokens is None else max(1, micro_batch_tokens // num_tokens)
    if group >= num_rows:
        with autocast(device, dtype):
            loss = model.loss(*batch)
        loss.backward()
        return loss.item()
    total, weight_sum = 0.0, batch[2].sum().item()
    for tokens, targets, weights in zip(*(part.split(group) for part in batch), strict=True):
        share = weights.sum().item() / weight_sum
        if share:  # a group without a weight has no mean
            with autocast(device, dtype):
                loss = share * model.loss(tokens, targets, weights)
            loss.backward()
            total += loss.item()
    return total


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast | nullcontext:
    """Return a context of mixed precision for bfloat16, of nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@torch.no_grad()
def mean_loss(
    model: SequenceModel, batches: Iterable[Batch], *, device: torch.device, dtype: torch.dtype
) -> float:
    """Return the mean weighted loss in nats over batches, in evaluation mode."""
    was_training = model.training
    model.eval()
    total = weight_sum = 0.0
    for batch in batches:
        tokens, targets, weights = (t.to(device) for t in batch)
        with autocast(device, dtype):
            loss = model.loss(tokens, targets, weights).item()
        weight = weights.sum().item()
        total, weight_sum = total + loss * weight, weight_sum + weight
    model.train(was_training)
    return total / weight_sum


def make_optimizer(model: nn.Module, settings: Training) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only, and not on those marked `is_decayed = False`."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim >= 2 and getattr(parameter, "is_decayed", True)
            (decayed if is_decayed else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, foreach=True)
