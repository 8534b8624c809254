"""From an exception to a typed outcome."""

from __future__ import annotations

import traceback

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )


def outcome(error: BaseException) -> tuple[str, str]:
    """Return status and reason of an exception that ended a measurement. What is not a lack of memory goes
    to stderr with its traceback."""
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if is_out_of_memory(error):
        return "oom", text
    traceback.print_exception(error)
    return ("unsupported" if isinstance(error, NotImplementedError) else "crashed"), text
