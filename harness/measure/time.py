"""Time calls, and measure the memory bandwidth and the matrix-product rate of a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from harness.measure.statistics import percentile


def time_call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Return the duration of one call in milliseconds, by CUDA events on a GPU and by a monotonic clock on a
    CPU."""
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
    """Return the bytes per second that copies read and write: the memory bandwidth of the device.

    num_bytes: size of a copy; it must exceed the caches by far. The result is the median of num_calls copies
    after one that is not timed."""
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2e3 * num_bytes / _median_ms(lambda: target.copy_(source), device, num_calls)


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype, width: int = 8192, num_calls: int = 20
) -> float:
    """Return the floating-point operations per second of square matrix products, against which utilisation is
    measured.

    The result is the median of num_calls products after one that is not timed."""
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return 2e3 * width**3 / _median_ms(lambda: a @ b, device, num_calls)


def _median_ms(call: Callable[[], object], device: torch.device, num_calls: int) -> float:
    call()
    return percentile([time_call_ms(call, device) for _ in range(num_calls)], 0.5)
