"""Jobs side by side: each in a thread that waits for its process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any


class Pool:
    """Starts a piece of work once fewer than `num_at_once` are under way.

    on_end:   is given what each piece returned and how many are still under way, in the thread that calls
              `start` and `wait`; what a piece raises is raised there.
    stopping: is set when all that is under way must end.
    """

    def __init__(self, on_end: Callable[[Any, int], None]) -> None:
        self.stopping = threading.Event()
        self._on_end = on_end
        self._lines: dict[Future[Any], int] = {}  # of what is under way

    def start(self, work: Callable[[int], Any], num_at_once: int) -> None:
        """Begins `work`, which is given the lowest free number from 0 on: the line of its progress bar. What
        runs alone, with num_at_once 1, is done on return."""
        self.wait(at_most=num_at_once - 1)
        if num_at_once == 1:
            self._on_end(work(0), 0)
            return
        line = min(set(range(num_at_once)) - set(self._lines.values()))
        future: Future[Any] = Future()
        self._lines[future] = line
        threading.Thread(target=_fulfil, args=(future, work, line), daemon=True).start()

    def wait(self, at_most: int = 0) -> None:
        """Returns when no more than `at_most` pieces are under way."""
        while len(self._lines) > at_most:
            done, _ = wait(self._lines, return_when=FIRST_COMPLETED)
            for future in done:
                del self._lines[future]
                self._on_end(future.result(), len(self._lines))

    def stop(self) -> None:
        """Sets `stopping` and returns when nothing is under way; what pieces return or raise is dropped."""
        self.stopping.set()
        wait(self._lines)
        self._lines.clear()


def _fulfil(future: Future[Any], work: Callable[[int], Any], line: int) -> None:
    try:
        future.set_result(work(line))
    except BaseException as error:
        future.set_exception(error)
