"""How fast a training step is, against what the machine's matrix products reach, the architectures in turn.

Metrics of a point (cell: context_tokens, batch_size):
    median_ms, p10_ms, p90_ms  of one loss and its gradients, all parameters', without an optimiser
    tokens_per_s               batch_size * context_tokens / median
    first_call_ms              the first step of this shape, with whatever compiles or tunes in it
    peak_memory_bytes          of torch's tensors in an untimed step, gradients included, weights not
    model_flops_per_s          three times the forward pass's products and attention, by formula, with the
                               logits of every token, over the median: elementwise work is not counted, nor
                               what is computed twice
    matmul_flops_per_s         the ceiling: what a large matrix product reached in this process
    utilisation                model_flops_per_s over it; null, as model_flops_per_s, where a model does not
                               say how wide its head is
Samples: time_ms, raw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from archs.base import SequenceModel
from harness.measure.memory import PeakMemory
from harness.measure.statistics import percentile
from harness.measure.time import matmul_flops_per_s, time_call_ms
from harness.record.metrics import Metric
from harness.record.outcomes import is_out_of_memory
from tasks.base import TIME_METRICS, Measurement, require_positive

Outcome = Measurement | tuple[str, str]  # or (status, reason)


class TrainingSpeed:
    """Training steps of several models on random tokens, interleaved.

    context_lengths_tokens, batch_tokens: a step is batch_tokens / length sequences, one at least.
    num_samples:  timed steps a model, after a first and an untimed one.
    max_cell_s:   a model whose first step takes longer is recorded as a timeout there and at longer
                  lengths.
    matmul_width: of the matrix product that is the ceiling.
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
    is_interleaved = True

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
        self._too_slow: dict[str, int] = {}  # model -> context
        self._ceiling: float | None = None

    def cells(self) -> list[dict[str, Any]]:
        """Shorter sequences first."""
        return [
            {"context_tokens": length, "batch_size": max(1, self.batch_tokens // length)}
            for length in self.context_lengths_tokens
        ]

    def measure_interleaved(
        self,
        models: Mapping[str, SequenceModel],
        cell: dict[str, Any],
        device: torch.device,
        on_turn: Callable[[str], None] = lambda name: None,
    ) -> Iterator[tuple[str, Outcome]]:
        """One step of each model in turn until each has all; yields each model's outcome."""
        if self._ceiling is None:
            dtype = next(next(iter(models.values())).parameters()).dtype if models else torch.float32
            self._ceiling = matmul_flops_per_s(device, dtype, width=self.matmul_width)
        shape = (cell["batch_size"], cell["context_tokens"] + 1)
        steps: dict[str, _Step] = {}
        for name, model in models.items():
            shorter = self._too_slow.get(name)
            if shorter is not None and shorter < cell["context_tokens"]:
                yield name, ("timeout", f"{shorter} tokens took longer than max_cell_s={self.max_cell_s:g}")
                continue
            on_turn(name)
            generator = torch.Generator().manual_seed(cell["context_tokens"])
            tokens = torch.randint(0, model.vocab_size, shape, generator=generator).to(device)
            step = _Step(model, tokens, device)
            failure = step.attempt(step.warm_up)
            seconds = step.first_call_ms / 1e3
            if failure is None and seconds > self.max_cell_s:
                self._too_slow[name] = cell["context_tokens"]
                reason = f"the first step took {seconds:.1f} s, more than max_cell_s={self.max_cell_s:g}"
                failure = "timeout", reason
            if failure is None:
                steps[name] = step
            else:
                yield name, failure
        for _ in range(self.num_samples):
            for name, step in list(steps.items()):
                on_turn(name)
                failure = step.attempt(step.sample)
                if failure is not None:
                    del steps[name]
                    yield name, failure
        for name, step in steps.items():
            yield name, step.measurement(cell, self._ceiling)


class _Step:
    """One model's training step."""

    def __init__(self, model: SequenceModel, tokens: Tensor, device: torch.device) -> None:
        self.model, self.tokens, self.device = model, tokens, device
        self.times_ms: list[float] = []
        self.first_call_ms = 0.0
        self.peak_memory_bytes: int | None = None

    def attempt(self, call: Callable[[], None]) -> tuple[str, str] | None:
        """Runs it; a lack of memory is returned, and gradients are freed whatever happens."""
        try:
            call()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return "oom", str(error).splitlines()[0]
        finally:
            self.model.zero_grad(set_to_none=True)
        return None

    def warm_up(self) -> None:
        """The first step, and one that is watched."""
        self.first_call_ms = time_call_ms(self._run, self.device)
        self.model.zero_grad(set_to_none=True)
        with PeakMemory(self.device) as memory:
            self._run()
        self.peak_memory_bytes = memory.bytes

    def sample(self) -> None:
        """One timed step."""
        self.times_ms.append(time_call_ms(self._run, self.device))

    def _run(self) -> None:
        with torch.enable_grad():
            self.model.loss(self.tokens[:, :-1], self.tokens[:, 1:]).backward()

    def measurement(self, cell: dict[str, Any], ceiling: float) -> Measurement:
        """The cell's numbers."""
        median_ms = percentile(self.times_ms, 0.5)
        batch, context = cell["batch_size"], cell["context_tokens"]
        flops = self._forward_flops(context)
        per_s = None if flops is None else 3e3 * batch * flops / median_ms
        metrics: dict[str, float | int | None] = {
            "median_ms": median_ms,
            "p10_ms": percentile(self.times_ms, 0.1),
            "p90_ms": percentile(self.times_ms, 0.9),
            "tokens_per_s": 1e3 * batch * context / median_ms,
            "first_call_ms": self.first_call_ms,
            "peak_memory_bytes": self.peak_memory_bytes,
            "model_flops_per_s": per_s,
            "matmul_flops_per_s": ceiling,
            "utilisation": None if per_s is None else per_s / ceiling,
        }
        return Measurement(metrics=metrics, samples={"time_ms": self.times_ms})

    def _forward_flops(self, context_tokens: int) -> float | None:
        """Products and attention of one sequence: the formula of a prefill has the logits of one token."""
        width = getattr(getattr(self.model, "base", self.model), "d_model", None)
        if width is None:
            return None
        flops = self.model.flops(context_tokens, "prefill")
        logits = 2.0 * width * self.model.vocab_size * (context_tokens - 1)
        return flops.matmul + flops.attention + logits
