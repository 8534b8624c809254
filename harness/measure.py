"""How time and memory are measured."""

from __future__ import annotations

import functools
import gc
import math
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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


def copy_bytes_per_s(device: torch.device, num_bytes: int = 2**31, num_calls: int = 20) -> float:
    """Bytes read and written in a second by copies of num_bytes, which is to be far more than the caches:
    the ceiling of all that is bound by memory. The median of num_calls, after a first."""
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2e3 * num_bytes / _median_ms(lambda: target.copy_(source), device, num_calls)


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype, width: int = 8192, num_calls: int = 20
) -> float:
    """Floating-point operations in a second of square matrix products: the ceiling of utilisation. The median
    of num_calls, after a first."""
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return 2e3 * width**3 / _median_ms(lambda: a @ b, device, num_calls)


def _median_ms(call: Callable[[], object], device: torch.device, num_calls: int) -> float:
    call()
    return percentile([time_call_ms(call, device) for _ in range(num_calls)], 0.5)


class PeakMemory:
    """Peak memory of torch's tensors in the block it surrounds, above what was held when it began.

    `bytes` is the allocator's own figure on a GPU. On a CPU it is the most that the tensors made in the
    block held between two operations, to the byte, whatever ran before; what an operation allocates and
    frees within itself is not in it. Watching costs time, so a block is not timed. None elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._start = 0
        self._tensors = _LiveTensors()

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._tensors.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif self.device.type == "cpu":
            self._tensors.__exit__(*exception)
            self.bytes = self._tensors.peak_bytes


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._bytes = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if _makes_nothing(function):
            return result
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages or _is_among(key, args) or _is_among(key, list(kwargs.values())):
                continue  # a view of, or in place on, one that was there before
            num_bytes = storage.nbytes()
            self._storages[key] = weakref.ref(storage, functools.partial(self._freed, key, num_bytes))
            self._bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        return result

    def _freed(self, key: int, num_bytes: int, reference: weakref.ref) -> None:
        del self._storages[key]
        self._bytes -= num_bytes


@functools.cache
def _makes_nothing(function: Any) -> bool:
    """Whether all that an operation returns is, by its schema, a view of or in place on what it was given:
    most operations are, and need no look."""
    returns = function._schema.returns
    return len(returns) > 0 and all(value.alias_info is not None for value in returns)


def _is_among(key: int, values: Any) -> bool:
    """Whether the storage is that of one of the tensors in nested lists and tuples."""
    return any(tensor.untyped_storage()._cdata == key for tensor in _tensors(values))


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


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
