"""Turns go to what matters most, then to who came first; none is lost."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.pull.turns import Turns
from registry.pull.upstream import Stopped


class Queue:
    """Threads that wait for the only place, which somebody has until ``go``."""

    def __init__(self) -> None:
        self.turns, self.order = Turns(1), []
        self.stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._held = self.turns.turn(lambda: 0, self.stop)
        self._held.__enter__()

    def wait(self, name: str, rank) -> None:
        def run() -> None:
            with self.turns.turn(rank, self.stop):
                self.order.append(name)

        before = len(self.turns._waiting)
        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)
        end = time.monotonic() + 10
        while len(self.turns._waiting) == before and time.monotonic() < end:
            time.sleep(0.001)

    def go(self) -> list[str]:
        self._held.__exit__(None, None, None)
        for thread in self._threads:
            thread.join(10)
        return self.order


def test_what_matters_more_goes_first_and_equals_in_order():
    queue = Queue()
    for name, rank in (("scratch", 2), ("first", 1), ("second", 1), ("critical", 0)):
        queue.wait(name, lambda rank=rank: rank)
    assert queue.go() == ["critical", "first", "second", "scratch"]


def test_a_class_that_is_given_meanwhile_counts():
    queue, ranks = Queue(), {"a": 1, "b": 1}
    for name in ("a", "b"):
        queue.wait(name, lambda name=name: ranks[name])
    ranks["b"] = 0
    assert queue.go() == ["b", "a"]


def test_who_is_stopped_leaves_and_takes_no_place():
    turns, stop = Turns(1), threading.Event()
    with turns.turn(lambda: 0, threading.Event()):
        stop.set()
        with pytest.raises(Stopped), turns.turn(lambda: 0, stop):
            raise AssertionError("it had no place")
    with turns.turn(lambda: 0, stop):
        pass  # there is one now, and who has it looks at ``stop`` itself


@given(st.integers(1, 4), st.lists(st.integers(0, 2), max_size=12))
def test_never_more_than_the_places_at_work_and_all_come_to_it(count, ranks):
    turns, lock = Turns(count), threading.Lock()
    now, most, done = 0, 0, 0

    def run(rank: int) -> None:
        nonlocal now, most, done
        with turns.turn(lambda: rank, threading.Event()):
            with lock:
                now += 1
                most = max(most, now)
            with lock:
                now -= 1
                done += 1

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert done == len(ranks)
    assert most <= count
    assert turns._free == count
