"""Jobs side by side."""

from __future__ import annotations

import threading
import time

import pytest

from harness.pool import Pool

TIMEOUT_S = 30


def test_as_many_at_once_as_asked_each_on_a_line_of_its_own() -> None:
    pool, both, lines = Pool(), threading.Barrier(2), []

    def meet(line: int) -> None:
        both.wait(TIMEOUT_S)  # breaks, and raises, where the other does not run beside it
        lines.append(line)

    pool.start(meet, 2)
    pool.start(meet, 2)
    pool.wait()
    assert sorted(lines) == [0, 1]


def test_no_more_at_once_than_asked_and_what_is_alone_waits_for_all() -> None:
    pool, lock, under_way, most, seen_alone = Pool(), threading.Lock(), 0, 0, []

    def work(line: int) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1

    for _ in range(6):
        pool.start(work, 3)
    pool.start(lambda line: seen_alone.append((line, under_way)), 1)
    assert seen_alone == [(0, 0)], "done on return"
    assert most <= 3


def test_an_error_is_raised_by_the_next_call() -> None:
    pool = Pool()

    def fail(line: int) -> None:
        raise ValueError("no such thing")

    pool.start(fail, 2)
    with pytest.raises(ValueError, match="no such thing"):
        pool.wait()
    pool.wait()


def test_stop_ends_what_is_under_way() -> None:
    pool, ended = Pool(), threading.Event()

    def work(line: int) -> None:
        assert ended.wait(TIMEOUT_S)
        raise KeyboardInterrupt

    pool.start(work, 2)
    pool.stop(ended.set)
    pool.wait()
