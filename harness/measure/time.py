"""How time and memory are measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from harness.measure.statistics import percentile


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
