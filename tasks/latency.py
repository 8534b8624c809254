"""Prefill and decode time against context, the architectures measured in turn.

Metrics of a point (cell: phase, context_tokens, batch_size):
    median_ms, p10_ms, p90_ms  of one call: the whole prefill (time to first token), or one token
    tokens_per_s               batch_size * tokens of the call / median
    first_call_ms              the first call of this shape, with whatever compiles or tunes in it
    peak_memory_bytes          of torch's tensors in an untimed call after the first, above what was held
                               before it (harness.measure.PeakMemory); null where it cannot be had
    state_bytes                measured on a state with room for context_tokens
    dispatch_ms                Transformer² alone: the first pass over the prompt, part of the time
                               to first token and shown apart
Samples: time_ms, raw. Each decode sample starts at context_tokens, from a copy of the prefilled state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from archs.base import SequenceModel, State, clone_state, state_bytes
from harness.measure import PeakMemory, is_out_of_memory, percentile, time_call_ms
from tasks.base import Measurement

Outcome = Measurement | tuple[str, str]  # or (status, reason)
Cell = dict[str, Any]


class Latency:
    """Latency of several models, interleaved, so that a drifting machine is fair to all.

    context_lengths_tokens, batch_sizes: the grid; both phases are measured at each.
    num_samples:        timed calls a cell and model, after a first call and an untimed warm-up.
    num_decode_steps:   tokens decoded a sample; the sample is their mean.
    max_cell_s:         a model whose first call takes longer than this is recorded as a timeout at
                        that cell and at longer contexts of the phase and batch; a prefill's
                        counts for decode, which needs it.
    chunk_tokens:       prefill is fed in chunks of this many tokens, so that activations stay bounded; a
                        model that `reads_whole_prompts` gets its prompt in one call, however long.
    """

    name = "latency"
    is_interleaved = True

    def __init__(
        self,
        *,
        context_lengths_tokens: Sequence[int],
        batch_sizes: Sequence[int],
        num_samples: int,
        num_decode_steps: int,
        max_cell_s: float,
        chunk_tokens: int,
    ) -> None:
        for name, values in (
            ("context_lengths_tokens", context_lengths_tokens),
            ("batch_sizes", batch_sizes),
        ):
            if not values or any(value < 1 for value in values):
                raise ValueError(f"tasks.latency.{name}={list(values)} must be positive numbers")
        for name, value in (
            ("num_samples", num_samples),
            ("num_decode_steps", num_decode_steps),
            ("max_cell_s", max_cell_s),
            ("chunk_tokens", chunk_tokens),
        ):
            if value <= 0:
                raise ValueError(f"tasks.latency.{name}={value} must be positive")
        self.context_lengths_tokens, self.batch_sizes = sorted(context_lengths_tokens), list(batch_sizes)
        self.num_samples, self.num_decode_steps = num_samples, num_decode_steps
        self.max_cell_s, self.chunk_tokens = max_cell_s, chunk_tokens
        self._too_slow: dict[tuple[str, str, int], int] = {}  # (model, phase, batch) -> context

    def cells(self) -> list[Cell]:
        """The grid, shorter contexts first."""
        return [
            {"phase": phase, "context_tokens": context, "batch_size": batch}
            for phase in ("prefill", "decode")
            for batch in self.batch_sizes
            for context in self.context_lengths_tokens
        ]

    @torch.no_grad()
    def measure_interleaved(
        self,
        models: Mapping[str, SequenceModel],
        cell: Cell,
        device: torch.device,
        on_turn: Callable[[str], None] = lambda name: None,
    ) -> Iterator[tuple[str, Outcome]]:
        """One sample of each model in turn until each has all; yields each model's outcome.

        A model that runs out of memory beside the others' states is tried again, alone, after them.
        on_turn is told whose turn it is, so that a crash can be put down to a model."""
        probes: dict[str, _Probe] = {}
        retried: list[str] = []
        for name, model in models.items():
            reason = self._known_timeout(name, cell)
            if reason is not None:
                yield name, ("timeout", reason)
                continue
            on_turn(name)
            try:
                probes[name] = _Probe(self, model, cell, device)
            except (RuntimeError, MemoryError) as error:
                failure = _failure(error)
                if probes and cell["phase"] == "decode":
                    retried.append(name)
                else:
                    yield name, failure
                continue
            if probes[name].is_too_slow:
                yield name, self._timeout(name, probes.pop(name))
        for _ in range(self.num_samples):
            for name in list(probes):
                on_turn(name)
                try:
                    probes[name].sample()
                except (RuntimeError, MemoryError) as error:
                    failure = _failure(error)
                    del probes[name]
                    if probes and cell["phase"] == "decode":
                        retried.append(name)
                    else:
                        yield name, failure
        for name in list(probes):
            yield name, probes.pop(name).measurement()
        for name in retried:
            yield from self.measure_interleaved({name: models[name]}, cell, device, on_turn)

    def _known_timeout(self, name: str, cell: Cell) -> str | None:
        """Why a model need not be tried here: it was too slow at a shorter context, or its prefill,
        which decode needs too, at one no longer."""
        context, batch = cell["context_tokens"], cell["batch_size"]
        shorter = self._too_slow.get((name, cell["phase"], batch))
        if shorter is not None and shorter < context:
            return f"{shorter} tokens took longer than max_cell_s={self.max_cell_s:g}"
        prefill = self._too_slow.get((name, "prefill", batch))
        if cell["phase"] == "decode" and prefill is not None and prefill <= context:
            return f"the prefill of {prefill} tokens took longer than max_cell_s={self.max_cell_s:g}"
        return None

    def _timeout(self, name: str, probe: _Probe) -> tuple[str, str]:
        cell = probe.cell
        self._too_slow[name, cell["phase"], cell["batch_size"]] = cell["context_tokens"]
        seconds = probe.first_call_ms / 1e3
        return "timeout", f"the first call took {seconds:.1f} s, more than max_cell_s={self.max_cell_s:g}"


def _failure(error: BaseException) -> tuple[str, str]:
    if not is_out_of_memory(error):
        raise error
    return "oom", str(error).splitlines()[0]


class _Probe:
    """One model at one cell: warmed up, ready to be sampled."""

    def __init__(self, task: Latency, model: SequenceModel, cell: Cell, device: torch.device) -> None:
        self.task, self.model, self.cell, self.device = task, model, cell, device
        context, batch = cell["context_tokens"], cell["batch_size"]
        generator = torch.Generator().manual_seed(context)
        tokens = torch.randint(0, model.vocab_size, (batch, context), generator=generator)
        self.tokens = tokens.to(device)
        self.times_ms: list[float] = []
        self.dispatch_ms: list[float] = []
        self.is_decode = cell["phase"] == "decode"
        self.state_bytes = state_bytes(model.init_state(batch, context))
        self.prefilled: State = self._prefill() if self.is_decode else None
        self.first_call_ms = self._call(self._timed)
        self.peak_memory_bytes: int | None = None
        self.is_too_slow = self.first_call_ms > 1e3 * task.max_cell_s
        if not self.is_too_slow:
            self._call(self._watched)  # also the warm-up
        self.dispatch_ms.clear()

    def sample(self) -> None:
        """One timed prefill, or the mean of num_decode_steps timed steps."""
        num_calls = self.task.num_decode_steps if self.is_decode else 1
        self.times_ms.append(self._call(self._timed) / num_calls)

    def _call(self, measure: Callable[[Callable[[], object]], Any]) -> Any:
        """Measures one prefill, or num_decode_steps steps on a copy that is made beforehand.

        The list keeps the last state until the clock has stopped, and none before it."""
        states: list[State] = []
        if not self.is_decode:
            return measure(lambda: states.append(self._prefill()))
        states.append(clone_state(self.prefilled))
        return measure(lambda: states.append(self._steps(states.pop())))

    def _timed(self, call: Callable[[], object]) -> float:
        return time_call_ms(call, self.device)

    def _watched(self, call: Callable[[], object]) -> None:
        with PeakMemory(self.device) as memory:
            call()
        self.peak_memory_bytes = memory.bytes

    def _prefill(self) -> State:
        batch, room = self.tokens.shape
        state = self.model.init_state(batch, room + (self.task.num_decode_steps if self.is_decode else 0))
        if self.model.is_adaptive:
            started = time.perf_counter_ns()
            state = self.model.dispatch(self.tokens, state)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.dispatch_ms.append((time.perf_counter_ns() - started) / 1e6)
        chunk_tokens = room if self.model.reads_whole_prompts else self.task.chunk_tokens
        for chunk in self.tokens.split(chunk_tokens, dim=1):
            _, state = self.model.prefill(chunk, state, num_logits=1)
        return state

    def _steps(self, state: State) -> State:
        token: Tensor = self.tokens[:, 0]
        for _ in range(self.task.num_decode_steps):
            _, state = self.model.decode(token, state)
        return state

    def measurement(self) -> Measurement:
        """The cell's numbers."""
        median_ms = percentile(self.times_ms, 0.5)
        num_tokens = self.cell["batch_size"] * (1 if self.is_decode else self.cell["context_tokens"])
        metrics: dict[str, float | int | None] = {
            "median_ms": median_ms,
            "p10_ms": percentile(self.times_ms, 0.1),
            "p90_ms": percentile(self.times_ms, 0.9),
            "tokens_per_s": 1e3 * num_tokens / median_ms,
            "first_call_ms": self.first_call_ms / (self.task.num_decode_steps if self.is_decode else 1),
            "peak_memory_bytes": self.peak_memory_bytes,
            "state_bytes": self.state_bytes,
        }
        if self.dispatch_ms:
            metrics["dispatch_ms"] = percentile(self.dispatch_ms, 0.5)
        return Measurement(metrics=metrics, samples={"time_ms": self.times_ms}, details={})
