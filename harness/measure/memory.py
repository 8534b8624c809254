"""Measure the peak memory of torch's tensors."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory:
    """Context manager that measures the peak memory of torch's tensors in its block, in `bytes`.

    Memory that was in use when the block began is not counted. On a GPU, `bytes` is the figure of torch's
    allocator. On a CPU, it is the exact maximum, between two operations, of the memory of the tensors that
    the block made; what an operation allocates and frees internally is not included. On other devices it is
    None. Measuring memory costs time, so do not time the same block.
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
    """Sum the bytes of the storages that operations have made and that are not freed yet."""

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
                continue  # a view of an earlier storage, or an operation in place on it
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
    """Return whether, by its schema, an operation makes no storage: all its results are views of its
    arguments, or its arguments changed in place. This holds for most operations and saves looking at them."""
    returns = function._schema.returns
    return len(returns) > 0 and all(value.alias_info is not None for value in returns)


def _is_among(key: int, values: Any) -> bool:
    """Return whether the storage belongs to one of the tensors in nested lists and tuples."""
    return any(tensor.untyped_storage()._cdata == key for tensor in _tensors(values))


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []
