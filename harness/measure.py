"""How time and memory are measured."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

#: Parameters of glibc's mallopt, by malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PROBE_MMAP_BYTES = 64 << 10
#: Where glibc's own adjustment ends in a process that has freed large blocks. mallopt turns that
#: adjustment off for good, so this is what timed calls after a probe run with.
USUAL_MMAP_BYTES = 32 << 20


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
    """Peak memory of the block it surrounds, above what was held when the block began.

    `bytes` is the allocator's peak on a GPU; with Linux and glibc the process's peak resident set,
    reset at the start through /proc/self/clear_refs; None where neither can be had.

    On a CPU, freed memory is given back to the system before the block and, in large blocks, at once
    within it: what the allocator keeps for later would otherwise hide what the block needs. That
    costs time, so a block is not timed. Call what is measured once before: a first call also loads
    code and fills caches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._start: int | None = None
        self._c_library: ctypes.CDLL | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        self._c_library = _glibc()
        if self._c_library is None:
            return self
        _set_thresholds(self._c_library, PROBE_MMAP_BYTES)
        self._c_library.malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._start = _status_bytes("VmRSS")
        except OSError:
            self._start = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._c_library is not None:
            _set_thresholds(self._c_library, USUAL_MMAP_BYTES)
        if self._start is None:
            return
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self.bytes = max(0, _status_bytes("VmHWM") - self._start)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def _set_thresholds(c_library: ctypes.CDLL, mmap_bytes: int) -> None:
    """Blocks from `mmap_bytes` on are mapped, and given back when freed; the top of the heap is given
    back when twice that is free. The ratio is glibc's own (mallopt(3))."""
    c_library.mallopt(M_MMAP_THRESHOLD, mmap_bytes)
    c_library.mallopt(M_TRIM_THRESHOLD, 2 * mmap_bytes)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


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
