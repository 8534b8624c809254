"""Peak memory of torch's tensors."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
