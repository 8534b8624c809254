"""How time and memory are measured."""

from __future__ import annotations

import gc
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def time_call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: CUDA events on a GPU, a monotonic clock on a CPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e6


class PeakMemory:
    """Peak memory of torch's tensors in the block it surrounds, above what was held when it began.

    `bytes` is the largest sum of what torch's allocator had handed out: on a GPU by its statistics, on a
    CPU by the profiler's record of every allocation, exactly, whatever ran before. Memory that is not
    torch's (Python's objects, buffers inside oneDNN or MKL) is left out on both. The record costs time,
    so a block is not timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._start = 0
        self._profile: torch.autograd.profiler.profile | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._profile = torch.autograd.profiler.profile(profile_memory=True)
            with _silent_stderr():
                self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif self._profile is not None:
            with _silent_stderr():
                self._profile.__exit__(*exception)
            events: list[Any] = self._profile.kineto_results.events()  # type: ignore[union-attr]
            changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
            changes.sort(key=lambda change: change[0])
            self.bytes = max(itertools.accumulate((num_bytes for _, num_bytes in changes), initial=0))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's own library writes a line at its start and its end."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The linearly interpolated percentile, `fraction` in 0..1, of at least one sample."""
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )


def outcome(error: BaseException) -> tuple[str, str]:
    """Status and reason of an exception that ended a measurement. What is not a lack of memory goes
    to stderr with its traceback."""
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if is_out_of_memory(error):
        return "oom", text
    traceback.print_exception(error)
    return ("unsupported" if isinstance(error, NotImplementedError) else "crashed"), text
