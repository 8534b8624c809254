"""The only training loop: AdamW, linear warm-up, cosine decay, the same batches for every model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from archs.base import SequenceModel
from harness.checkpoint import CheckpointError, load_training_state, save_training_state
from harness.measure import outcome

Batch = tuple[Tensor, Tensor, Tensor]  # tokens, targets, weights: (B, T) each


class Diverged(RuntimeError):
    """The loss stopped being a finite number; the message says at which step."""


class Failed(RuntimeError):
    """Training ended in an error of the model or the machine: a status of a record, and a reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@contextmanager
def typed_errors() -> Iterator[None]:
    """Makes every error of the block, whatever its class, a Failed; Diverged and what is wrong with a
    checkpoint (CheckpointError) pass. A ValueError of a model's step is no mistake of the user's."""
    try:
        yield
    except (Diverged, CheckpointError):
        raise
    except Exception as error:
        raise Failed(*outcome(error)) from error


class BatchSource(Protocol):
    """What training reads: a pure function of the step, so every architecture sees the same."""

    def batch(self, step: int) -> Batch: ...

    def validation_batches(self) -> Iterable[Batch]: ...

    def mixture_batches(self) -> Iterable[Batch]: ...


@runtime_checkable
class ProgressListener(Protocol):
    """A module that is told how far training is (TTT-MLP warms its inner learning rate)."""

    def set_training_progress(self, fraction: float) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of one training run (conf/train).

    num_steps:            optimiser steps.
    learning_rate:        the peak; final_ratio times it is reached at the last step, or final_learning_rate
                          where that is given.
    warmup_fraction:      of the steps, linear from 0.
    betas, weight_decay, gradient_clip: of AdamW; matrices alone decay.
    validation_interval_steps: between validation losses; the last step always validates.
    max_skipped_steps:    a step whose loss or gradient is not finite changes nothing and is counted;
                          one more than these is a divergence.
    micro_batch_tokens:   rows of a batch that go through the model together, in tokens (one row at least);
                          their gradients add up to the batch's. None: the whole batch at once.
    checkpoint_interval_s: between saves of the training state, from which a cut run continues.

    Raises ValueError for a value outside its range.
    """

    num_steps: int
    learning_rate: float
    warmup_fraction: float = 0.1
    final_ratio: float = 0.1
    final_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    validation_interval_steps: int = 100
    max_skipped_steps: int = 10
    micro_batch_tokens: int | None = None
    checkpoint_interval_s: float = 30.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"train.num_steps={self.num_steps} must be positive")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        final = self.final_learning_rate
        if final is not None and not 0 <= final <= self.learning_rate:
            raise ValueError(
                f"train.final_learning_rate={final} must lie between 0 and the peak, {self.learning_rate}"
            )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ValueError(f"train.micro_batch_tokens={self.micro_batch_tokens} must be positive")
        interval = self.validation_interval_steps
        if interval < 1:
            raise ValueError(f"train.validation_interval_steps={interval} must be positive")
        if not self.gradient_clip > 0:
            raise ValueError(f"train.gradient_clip={self.gradient_clip} must be positive")
        for name in ("warmup_fraction", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must lie between 0 and 1")
        for name in ("weight_decay", "max_skipped_steps", "checkpoint_interval_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={list(self.betas)} must lie between 0 and 1, 1 left out")

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        warmup = max(1, round(self.warmup_fraction * self.num_steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - 1 - warmup)
        cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        final = self.final_learning_rate
        final = self.final_ratio * self.learning_rate if final is None else final
        return final + (self.learning_rate - final) * cosine


@dataclass
class History:
    """What a run of training leaves beside the weights; lists of equal length in pairs."""

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
    """Trains in place and returns the history. Continues from `state_path` if it is there.

    A ProgressListener is told the share of the outer warm-up that is over. train_seconds counts steps, not
    validation. Raises Diverged where the loss or gradient is too often not finite.
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
    """The batch's weighted mean loss in nats; its gradients are added to the parameters'.

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
    """Mixed precision for bfloat16, nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@torch.no_grad()
def mean_loss(
    model: SequenceModel, batches: Iterable[Batch], *, device: torch.device, dtype: torch.dtype
) -> float:
    """Mean weighted loss in nats over batches, in evaluation mode."""
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
    """AdamW with weight decay on matrices alone, and not on those marked `is_decayed = False`."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim >= 2 and getattr(parameter, "is_decayed", True)
            (decayed if is_decayed else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, foreach=True)
