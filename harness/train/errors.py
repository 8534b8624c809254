"""Errors that end training without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harness.record.outcomes import outcome


class CheckpointError(ValueError):
    """A checkpoint that is damaged, does not fit or cannot be written; the message says what to do."""


class Diverged(RuntimeError):
    """The loss stopped being a finite number; the message says at which step."""


class Failed(RuntimeError):
    """Training ended in an error of the model or the machine: a status of a record, and a reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turn every error of the block into Failed, but for Diverged and CheckpointError. A ValueError raised by
    a model's step is not a mistake of the user's."""
    try:
        yield
    except (Diverged, CheckpointError):
        raise
    except Exception as error:
        raise Failed(*outcome(error)) from error
