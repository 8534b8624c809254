"""Jobs side by side."""

from __future__ import annotations

import threading
import time

import pytest

from harness.run.local import Pool

TIMEOUT_S = 30


def ignore(result: object, num_under_way: int) -> None:
    pass


def test_as_many_at_once_as_asked_each_on_a_line_of_its_own() -> None:
    ended: list[tuple[int, int]] = []
    both = threading.Barrier(2)
    pool = Pool(lambda line, num_under_way: ended.append((line, num_under_way)))

    def meet(line: int) -> int:
        both.wait(TIMEOUT_S)  # breaks, and raises, where the other does not run beside it
        return line

    pool.start(meet, 2)
    pool.start(meet, 2)
    pool.wait()
    assert sorted(line for line, _ in ended) == [0, 1]
    assert [num_under_way for _, num_under_way in ended] == [1, 0]


def test_no_more_at_once_than_asked_and_what_is_alone_waits_for_all() -> None:
    lock, under_way, most, seen_alone = threading.Lock(), 0, 0, []
    pool = Pool(ignore)

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
    pool = Pool(ignore)

    def fail(line: int) -> None:
        raise ValueError("no such thing")

    pool.start(fail, 2)
    with pytest.raises(ValueError, match="no such thing"):
        pool.wait()
    pool.wait()


def test_stop_ends_what_is_under_way_and_drops_it() -> None:
    ended: list[object] = []
    pool = Pool(lambda result, num_under_way: ended.append(result))

    def work(line: int) -> None:
        assert pool.stopping.wait(TIMEOUT_S)
        raise KeyboardInterrupt

    pool.start(work, 2)
    pool.stop()
    pool.wait()
    assert ended == []
