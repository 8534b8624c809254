"""Measure the time of a training step, for several architectures in turn.

The utilisation compares a step with the rate that large matrix products reach on the same machine.

Metrics of a point (cell: context_tokens, batch_size):
    median_ms, p10_ms, p90_ms  time of one loss and the gradients of all parameters, without an optimiser
    tokens_per_s               batch_size * context_tokens / median
    first_call_ms              time of the first step of this shape, including compilation and tuning
    peak_memory_bytes          peak memory of torch's tensors in an untimed step, with gradients and without
                               weights
    model_flops_per_s          three times the FLOPs of the forward pass, by formula, over the median. Matrix
                               products, attention and the logits of every token count; elementwise work and
                               recomputation do not
    matmul_flops_per_s         the rate that a large matrix product reached in this process
    utilisation                model_flops_per_s / matmul_flops_per_s
model_flops_per_s and utilisation are null where a model has no d_model, from which its logits are counted.
Samples: time_ms, raw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from archs.base import SequenceModel
from harness.measure.memory import PeakMemory
from harness.measure.statistics import percentile
from harness.measure.time import matmul_flops_per_s, time_call_ms
from harness.measure.turns import Failure, TimingRun, take_turns
from harness.record.metrics import Metric
from tasks.base import Measurement, TimingTask, require_positive
from tasks.timing import TIME_METRICS, time_metrics


class TrainingSpeed(TimingTask):
    """The task of this module. Tokens are random.

    context_lengths_tokens: sequence lengths.
    batch_tokens: tokens per step, which has batch_tokens / length sequences, and at least one.
    num_samples:  timed steps per model, after a first and an untimed one.
    max_cell_s:   a model whose first step takes longer is recorded as a timeout, there and at longer lengths.
    matmul_width: width of the matrix product with which the steps are compared.
    Raises ValueError where a number is not positive.
    """

    name = "training_speed"
    METRICS = (
        *TIME_METRICS,
        Metric(
            name="model_flops_per_s", label="model FLOP/s", unit="FLOP/s", direction="higher", kind="cost"
        ),
        Metric(
            name="matmul_flops_per_s",
            label="matrix product FLOP/s",
            unit="FLOP/s",
            direction="neither",
            kind="cost",
        ),
        Metric(name="utilisation", label="utilisation", unit="share", direction="higher", kind="cost"),
    )
    CELL_SETTINGS = ("context_lengths_tokens", "batch_tokens")

    def __init__(
        self,
        *,
        context_lengths_tokens: Sequence[int],
        batch_tokens: int,
        num_samples: int = 5,
        max_cell_s: float = 60.0,
        matmul_width: int = 8192,
    ) -> None:
        for length in context_lengths_tokens or [0]:
            require_positive("tasks.training_speed", context_lengths_tokens=length)
        require_positive(
            "tasks.training_speed",
            batch_tokens=batch_tokens,
            num_samples=num_samples,
            matmul_width=matmul_width,
        )
        if max_cell_s <= 0:
            raise ValueError(f"tasks.training_speed.max_cell_s={max_cell_s} must be positive")
        self.context_lengths_tokens, self.batch_tokens = sorted(context_lengths_tokens), batch_tokens
        self.num_samples, self.max_cell_s, self.matmul_width = num_samples, max_cell_s, matmul_width

    def cells(self) -> list[dict[str, Any]]:
        """Return the grid, shorter sequences first."""
        return [
            {"context_tokens": length, "batch_size": max(1, self.batch_tokens // length)}
            for length in self.context_lengths_tokens
        ]

    def measure_in_turn(
        self,
        models: Mapping[str, SequenceModel],
        cell: dict[str, Any],
        run: TimingRun,
        on_turn: Callable[[str], None] = lambda name: None,
    ) -> Iterator[tuple[str, Measurement | Failure]]:
        """Time one cell for every model; see TimingTask."""
        due = []
        for name in models:
            shorter = run.too_slow.get((self.name, name))
            if shorter is not None and shorter < cell["context_tokens"]:
                reason = f"{shorter} tokens took longer than max_cell_s={self.max_cell_s:g}"
                yield name, Failure("timeout", reason)
            else:
                due.append(name)
        if not due:
            return
        dtype = next(models[due[0]].parameters()).dtype
        reached = run.once(
            ("matmul_flops_per_s", dtype, self.matmul_width),
            lambda: matmul_flops_per_s(run.device, dtype, width=self.matmul_width),
        )
        for name, result in take_turns(
            lambda name: _Step(models[name], cell, run.device, reached, self.max_cell_s),
            due,
            num_rounds=self.num_samples,
            max_first_call_s=self.max_cell_s,
            is_retried_alone=False,
            on_turn=on_turn,
        ):
            if isinstance(result, Failure) and result.status == "timeout":
                run.too_slow[self.name, name] = cell["context_tokens"]
            yield name, result


class _Step:
    """The training step of a warm model at one cell. Gradients are freed after every call, even after an
    error."""

    def __init__(
        self,
        model: SequenceModel,
        cell: dict[str, Any],
        device: torch.device,
        matmul_flops_per_s: float,
        max_first_call_s: float,
    ) -> None:
        self.model, self.cell, self.device = model, cell, device
        self.matmul_flops_per_s = matmul_flops_per_s
        generator = torch.Generator().manual_seed(cell["context_tokens"])
        shape = (cell["batch_size"], cell["context_tokens"] + 1)
        self.tokens = torch.randint(0, model.vocab_size, shape, generator=generator).to(device)
        self.times_ms: list[float] = []
        self.first_call_ms = self._time_ms()
        self.peak_memory_bytes: int | None = None
        if self.first_call_ms <= 1e3 * max_first_call_s:
            self.peak_memory_bytes = self._watch_bytes()  # also the warm-up

    def sample(self) -> None:
        """Time one step."""
        self.times_ms.append(self._time_ms())

    def _time_ms(self) -> float:
        try:
            return time_call_ms(self._run, self.device)
        finally:
            self.model.zero_grad(set_to_none=True)

    def _watch_bytes(self) -> int | None:
        try:
            with PeakMemory(self.device) as memory:
                self._run()
            return memory.bytes
        finally:
            self.model.zero_grad(set_to_none=True)

    def _run(self) -> None:
        with torch.enable_grad():
            self.model.loss(self.tokens[:, :-1], self.tokens[:, 1:]).backward()

    def measurement(self) -> Measurement:
        """Return the cell's numbers."""
        batch, context = self.cell["batch_size"], self.cell["context_tokens"]
        metrics = time_metrics(
            self.times_ms,
            num_tokens=batch * context,
            first_call_ms=self.first_call_ms,
            peak_memory_bytes=self.peak_memory_bytes,
        )
        flops = self._forward_flops(context)
        per_s = None if flops is None else 3e3 * batch * flops / percentile(self.times_ms, 0.5)
        metrics |= {
            "model_flops_per_s": per_s,
            "matmul_flops_per_s": self.matmul_flops_per_s,
            "utilisation": None if per_s is None else per_s / self.matmul_flops_per_s,
        }
        return Measurement(metrics=metrics, samples={"time_ms": self.times_ms})

    def _forward_flops(self, context_tokens: int) -> float | None:
        """Return the FLOPs of matrix products and attention for one sequence; None without a d_model.

        The formula of a prefill counts the logits of one token, so those of the others are added."""
        width = getattr(getattr(self.model, "base", self.model), "d_model", None)
        if width is None:
            return None
        flops = self.model.flops(context_tokens, "prefill")
        logits = 2.0 * width * self.model.vocab_size * (context_tokens - 1)
        return flops.matmul + flops.attention + logits
