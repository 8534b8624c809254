"""Measure prefill and decode time against context, for several architectures in turn.

Metrics of a point (cell: phase, context_tokens, batch_size):
    median_ms, p10_ms, p90_ms  time of one call: the whole prefill (time to first token), or one decoded token
    tokens_per_s               batch_size * tokens of the call / median
    first_call_ms              time of the first call of this shape, including compilation and tuning
    peak_memory_bytes          peak memory of torch's tensors in an untimed call after the first, without the
                               memory in use before it (harness.measure.memory.PeakMemory); null where it
                               cannot be measured. In decode, it is that of plain steps, even where graphs are
                               timed
    state_bytes                size of a state with room for context_tokens
    traffic_bytes              decode: the least that a step must move. It reads all weights and the state,
                               and writes the state: all of it, or, where the state grows, the part that a
                               token adds
    copy_bytes_per_s           decode on a GPU: bytes that a large copy in this process reads and writes per
                               second
    floor_ms                   decode on a GPU: the bandwidth bound, traffic_bytes / copy_bytes_per_s
    dispatch_ms                Transformer² alone: the first pass over the prompt. It is part of the time to
                               first token
Samples: time_ms, raw. Each decode sample starts at context_tokens, from a copy of one state.
Details of decode: is_prefilled (whether that state came from a prefill), uses_decode_graph,
num_decode_graphs, and why_no_decode_graph where `auto` could not capture graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from archs.base import SequenceModel, State, clone_state, state_bytes
from archs.decode_graph import CudaCapture, DecodeGraphs, can_capture, with_num_tokens
from harness.measure.memory import PeakMemory
from harness.measure.statistics import percentile
from harness.measure.time import copy_bytes_per_s, time_call_ms
from harness.measure.turns import Failure, TimingRun, take_turns
from harness.record.metrics import Metric
from harness.record.outcomes import is_out_of_memory
from tasks.base import Measurement, TimingTask
from tasks.timing import TIME_METRICS, time_metrics

Cell = dict[str, Any]


class Latency(TimingTask):
    """The task of this module.

    context_lengths_tokens, batch_sizes: the grid.
    phases:              prefill, decode, or both; each is measured at every point of the grid.
    num_samples:         timed calls per cell and model, after a first call and an untimed warm-up.
    num_decode_steps:    tokens decoded per sample; the sample is the mean time of a token.
    max_cell_s:          a model whose first call takes longer is recorded as a timeout, at that cell and at
                         longer contexts of the same phase and batch. A timeout of a prefill also counts for
                         the decode that needs it.
    prefills_for_decode: if false, skip the prefill and decode from an empty state that is marked as holding
                         context_tokens. The time is the same, and decode can be measured even where the
                         prefill is too slow or does not fit.
    decode_graph:        true: replay decode steps from CUDA graphs (archs.decode_graph), whose capture is
                         part of the first call; a model without graphs is recorded as unsupported. false:
                         call the steps one by one. auto: use graphs on a GPU, for models that have them.
    chunk_tokens:        tokens per prefill call, so that activations stay bounded. A model that
                         `reads_whole_prompts` gets its prompt in one call, however long.
    Raises ValueError where a number is not positive or there is no phase.
    """

    name = "latency"
    METRICS = (
        *TIME_METRICS,
        Metric(name="state_bytes", label="state", unit="bytes", direction="lower", kind="cost"),
        Metric(name="traffic_bytes", label="traffic per step", unit="bytes", direction="lower", kind="cost"),
        Metric(name="copy_bytes_per_s", label="copy", unit="bytes/s", direction="neither", kind="cost"),
        Metric(name="floor_ms", label="bandwidth bound", unit="ms", direction="neither", kind="cost"),
        Metric(name="dispatch_ms", label="dispatch", unit="ms", direction="lower", kind="cost"),
    )
    CELL_SETTINGS = ("context_lengths_tokens", "batch_sizes", "phases")

    def __init__(
        self,
        *,
        context_lengths_tokens: Sequence[int],
        batch_sizes: Sequence[int],
        num_samples: int,
        num_decode_steps: int,
        max_cell_s: float,
        chunk_tokens: int,
        decode_graph: Literal["auto", True, False] = "auto",
        prefills_for_decode: bool = True,
        phases: Sequence[Literal["prefill", "decode"]] = ("prefill", "decode"),
    ) -> None:
        if not phases:
            raise ValueError("tasks.latency.phases=[] must name prefill, decode or both")
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
        self.max_cell_s, self.chunk_tokens, self.decode_graph = max_cell_s, chunk_tokens, decode_graph
        self.prefills_for_decode, self.phases = prefills_for_decode, list(phases)

    def cells(self) -> list[Cell]:
        """Return the grid, shorter contexts first."""
        return [
            {"phase": phase, "context_tokens": context, "batch_size": batch}
            for phase in self.phases
            for batch in self.batch_sizes
            for context in self.context_lengths_tokens
        ]

    @torch.no_grad()
    def measure_in_turn(
        self,
        models: Mapping[str, SequenceModel],
        cell: Cell,
        run: TimingRun,
        on_turn: Callable[[str], None] = lambda name: None,
    ) -> Iterator[tuple[str, Measurement | Failure]]:
        """Time one cell for every model; see TimingTask.

        A model that runs out of memory in decode beside the others' states is tried again after them.
        Raises ValueError where decode_graph is true and the device has no graphs."""
        device = run.device
        if self.decode_graph is True and not can_capture(device):
            raise ValueError(
                f"tasks.latency.decode_graph=true needs device=cuda, not {device.type}; choose auto or false."
            )
        is_decode = cell["phase"] == "decode"
        copied: float | None = None
        if is_decode and can_capture(device):
            copied = run.once("copy_bytes_per_s", lambda: copy_bytes_per_s(device))
        due = []
        for name in models:
            reason = self._known_timeout(name, cell, run)
            if reason is None:
                due.append(name)
            else:
                yield name, Failure("timeout", reason)
        for name, result in take_turns(
            lambda name: _Probe(self, models[name], cell, device, copied),
            due,
            num_rounds=self.num_samples,
            max_first_call_s=self.max_cell_s,
            is_retried_alone=is_decode,
            on_turn=on_turn,
        ):
            if isinstance(result, Failure) and result.status == "timeout":
                run.too_slow[self._slow_key(name, cell["phase"], cell)] = cell["context_tokens"]
            yield name, result

    def _slow_key(self, name: str, phase: str, cell: Cell) -> tuple[str, str, str, int]:
        return self.name, name, phase, cell["batch_size"]

    def _known_timeout(self, name: str, cell: Cell, run: TimingRun) -> str | None:
        """Return why a model need not be tried, or None.

        It need not where it was too slow at a shorter context, or where its prefill, which decode needs, was
        too slow at this context or a shorter one."""
        context = cell["context_tokens"]
        shorter = run.too_slow.get(self._slow_key(name, cell["phase"], cell))
        if shorter is not None and shorter < context:
            return f"{shorter} tokens took longer than max_cell_s={self.max_cell_s:g}"
        prefill = run.too_slow.get(self._slow_key(name, "prefill", cell))
        needs_prefill = cell["phase"] == "decode" and self.prefills_for_decode
        if needs_prefill and prefill is not None and prefill <= context:
            return f"the prefill of {prefill} tokens took longer than max_cell_s={self.max_cell_s:g}"
        return None


class _Probe:
    """A warm model at one cell."""

    def __init__(
        self,
        task: Latency,
        model: SequenceModel,
        cell: Cell,
        device: torch.device,
        copy_bytes_per_s: float | None,
    ) -> None:
        self.task, self.model, self.cell, self.device = task, model, cell, device
        self.copy_bytes_per_s = copy_bytes_per_s
        context, batch = cell["context_tokens"], cell["batch_size"]
        generator = torch.Generator().manual_seed(context)
        tokens = torch.randint(0, model.vocab_size, (batch, context), generator=generator)
        self.tokens = tokens.to(device)
        self.times_ms: list[float] = []
        self.dispatch_ms: list[float] = []
        self.is_decode = cell["phase"] == "decode"
        self.state_bytes = state_bytes(model.init_state(batch, context))
        self.prefilled: State = None  # the state from which a decode sample starts
        if self.is_decode and task.prefills_for_decode:
            self.prefilled = self._prefill()
        elif self.is_decode:
            state = model.init_state(batch, context + task.num_decode_steps)
            self.prefilled = with_num_tokens(state, context)
        self.graphs: DecodeGraphs | None = None
        self.why_no_graph: str | None = None
        self.first_call_ms = 0.0
        if self.is_decode and task.decode_graph is not False and can_capture(device):
            self.first_call_ms = self._timed(self._capture)
        self.first_call_ms += self._call(self._timed)
        self.peak_memory_bytes: int | None = None
        if self.first_call_ms <= 1e3 * task.max_cell_s:
            self._call(self._watched, is_plain=True)  # also the warm-up
        self.dispatch_ms.clear()

    def sample(self) -> None:
        """Time one prefill, or num_decode_steps steps, of which the sample is the mean."""
        num_calls = self.task.num_decode_steps if self.is_decode else 1
        self.times_ms.append(self._call(self._timed) / num_calls)

    def _capture(self) -> None:
        """Capture the steps of a sample. With `auto`, keep the reason of a failure, and call the steps."""
        context = self.tokens.shape[1]
        num_steps = self.task.num_decode_steps
        try:
            state, capture = clone_state(self.prefilled), CudaCapture(self.device)
            graphs = DecodeGraphs(self.model, state, context + num_steps, capture)
            graphs.prepare(context, num_steps)
        except RuntimeError as error:  # NotImplementedError is one
            if self.task.decode_graph is True or is_out_of_memory(error):
                raise
            self.why_no_graph = str(error).splitlines()[0]
        else:
            self.graphs = graphs

    def _call(self, measure: Callable[[Callable[[], object]], Any], *, is_plain: bool = False) -> Any:
        """Measure one prefill, or num_decode_steps steps on a copy of the state that is made beforehand.

        is_plain: whether to call the steps even where there are graphs of them.

        The list keeps the last state alive until the clock has stopped, and no earlier state."""
        states: list[State] = []
        if not self.is_decode:
            return measure(lambda: states.append(self._prefill()))
        graphs = self.graphs
        if graphs is not None:
            states.append(graphs.load(self.prefilled))
            if not is_plain:
                return measure(lambda: self._replays(graphs))
        else:
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

    def _replays(self, graphs: DecodeGraphs) -> None:
        for _ in range(self.task.num_decode_steps):
            graphs.step(self.tokens[:, 0])

    def measurement(self) -> Measurement:
        """Return the cell's numbers."""
        metrics = time_metrics(
            self.times_ms,
            num_tokens=self.cell["batch_size"] * (1 if self.is_decode else self.cell["context_tokens"]),
            first_call_ms=self.first_call_ms / (self.task.num_decode_steps if self.is_decode else 1),
            peak_memory_bytes=self.peak_memory_bytes,
        )
        metrics["state_bytes"] = self.state_bytes
        if self.dispatch_ms:
            metrics["dispatch_ms"] = percentile(self.dispatch_ms, 0.5)
        details: dict[str, Any] = {}
        if self.is_decode:
            traffic_bytes, copied = self._traffic_bytes(), self.copy_bytes_per_s
            metrics["traffic_bytes"] = traffic_bytes
            if copied is not None:
                metrics |= {"copy_bytes_per_s": copied, "floor_ms": 1e3 * traffic_bytes / copied}
            details["is_prefilled"] = self.task.prefills_for_decode
            details["uses_decode_graph"] = self.graphs is not None
            if self.graphs is not None:
                details["num_decode_graphs"] = self.graphs.num_graphs
            elif self.why_no_graph is not None:
                details["why_no_decode_graph"] = self.why_no_graph
        return Measurement(metrics=metrics, samples={"time_ms": self.times_ms}, details=details)

    def _traffic_bytes(self) -> int:
        weights = {t.data_ptr(): t for t in (*self.model.parameters(), *self.model.buffers())}
        batch, context = self.tokens.shape
        state, longer = (self.model.state_bytes_at(batch, n) for n in (context, context + 1))
        written = longer - state if longer > state else state
        return sum(t.numel() * t.element_size() for t in weights.values()) + state + written
