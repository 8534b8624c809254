"""Jobs side by side: each in a thread that waits for its process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait


class Pool:
    """Starts work as soon as fewer pieces are under way than it allows beside it, itself included.

    What a piece raises is raised by the next call of `start` or `wait`."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=None)
        self._lines: dict[Future[None], int] = {}  # of what is under way

    def start(self, work: Callable[[int], None], num_at_once: int) -> None:
        """Begins `work`, which gets the lowest free number from 0 on: the line of its progress bar. What must
        be alone, num_at_once=1, is done on return."""
        self.wait(at_most=num_at_once - 1)
        if num_at_once == 1:
            work(0)
            return
        line = min(set(range(num_at_once)) - set(self._lines.values()))
        self._lines[self._executor.submit(work, line)] = line

    def wait(self, at_most: int = 0) -> None:
        """Returns when no more than `at_most` pieces are under way."""
        while len(self._lines) > at_most:
            done, _ = wait(self._lines, return_when=FIRST_COMPLETED)
            for future in done:
                del self._lines[future]
                future.result()

    def stop(self, end_processes: Callable[[], None]) -> None:
        """Calls `end_processes` until all that is under way has ended; what it raises is dropped."""
        while self._lines:
            end_processes()
            done, _ = wait(self._lines, timeout=0.1)
            for future in done:
                del self._lines[future]
