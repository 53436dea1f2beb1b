"""The queue beside the simplest model that says whose turn may be when."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orchestrator.runtime.queue import Limits, Queue

LIMITS = Limits(first_s=1.0, most_s=8.0, rate=1000.0, burst=1000)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def made(limits: Limits = LIMITS, jitter: float = 1.0) -> tuple[Queue[str], Clock]:
    clock = Clock()
    return Queue(limits, clock, jitter=lambda: jitter), clock


def test_a_key_is_in_the_queue_once():
    queue, _ = made()
    for _ in range(3):
        queue.add("a")
    assert (queue.take(), queue.take(), len(queue)) == ("a", None, 0)


def test_what_comes_while_a_key_is_worked_on_is_done_afterwards_and_never_beside_it():
    queue, _ = made()
    queue.add("a")
    assert queue.take() == "a"
    queue.add("a")
    assert queue.take() is None
    queue.done("a")
    assert queue.take() == "a"
    queue.done("a")
    assert (queue.take(), queue.wait_s()) == (None, None)


def test_waits_double_to_a_limit_and_begin_anew_after_success():
    queue, clock = made()
    queue.add("a")
    waits = []
    for _ in range(6):
        assert queue.take() == "a"
        queue.done("a", failed=True)
        waits.append(queue.wait_s())
        clock.now += waits[-1]
    assert waits == [1, 2, 4, 8, 8, 8]
    queue.take()
    queue.done("a")
    queue.add("a")
    queue.take()
    queue.done("a", failed=True)
    assert queue.wait_s() == 1


def test_jitter_halves_a_wait_at_most():
    queue, _ = made(jitter=0.0)
    queue.add("a")
    queue.take()
    queue.done("a", failed=True)
    assert queue.wait_s() == 0.5


def test_a_key_that_fails_and_changes_something_does_not_spin():
    queue, clock = made()
    queue.add("a")
    turns, end = 0, clock.now + 60
    while clock.now < end:
        if queue.take() is None:
            clock.now += 0.01
            continue
        turns += 1
        queue.add("a")  # its own change comes back as an event
        queue.done("a", failed=True)
        queue.add("a")
    assert turns <= 62


def test_a_change_brings_a_failing_key_forward():
    queue, clock = made()
    queue.add("a")
    for _ in range(5):
        queue.take()
        queue.done("a", failed=True)
        clock.now += queue.wait_s()
    queue.take()
    queue.done("a", failed=True)
    assert queue.wait_s() == 8
    queue.add("a")
    assert queue.wait_s() == 1, "the first wait is kept"


def test_what_the_server_asks_to_wait_is_waited():
    queue, _ = made()
    queue.add("a")
    queue.take()
    queue.done("a", failed=True, again_in_s=30)
    queue.add("a")
    assert queue.wait_s() == 30


def test_turns_have_a_rate():
    queue, clock = made(Limits(rate=10.0, burst=5))
    for number in range(50):
        queue.add(str(number))
    taken, begin = 0, clock.now
    while taken < 50:
        if queue.take() is None:
            clock.now += max(queue.wait_s(), 1e-6)
        else:
            taken += 1
    assert clock.now - begin == pytest.approx(4.5, rel=0.01)


def test_the_longest_due_comes_first():
    queue, clock = made()
    queue.add("late", 5)
    queue.add("b")
    clock.now += 1
    queue.add("c")
    clock.now += 10
    assert [queue.take() for _ in range(4)] == ["b", "c", "late", None]


class Turns(RuleBasedStateMachine):
    """Nothing that was added is lost, nobody works twice on a key, nothing comes too early."""

    keys = st.sampled_from(["a", "b", "c", "d"])

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.clock = made()
        self.owed: dict[str, float] = {}
        """Key -> when its turn has to be possible at the latest."""
        self.working: set[str] = set()
        self.earliest: dict[str, float] = {}

    @rule(key=keys, after=st.sampled_from([0.0, 0.5, 3.0]))
    def add(self, key: str, after: float) -> None:
        self.queue.add(key, after)
        due = max(self.clock.now + after, self.earliest.get(key, 0.0))
        self.owed[key] = min(due, self.owed.get(key, due))

    @rule(seconds=st.sampled_from([0.01, 0.5, 1.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def take(self) -> None:
        key = self.queue.take()
        ready = {one for one, due in self.owed.items() if due <= self.clock.now and one not in self.working}
        if key is None:
            assert ready == set(), "somebody's turn was due"
            return
        assert key in ready, "too early, never added, or worked on already"
        del self.owed[key]
        self.working.add(key)

    @rule(key=keys, failed=st.booleans(), again=st.sampled_from([None, 0.0, 2.0]))
    def done(self, key: str, failed: bool, again: float | None) -> None:
        if key not in self.working:
            return
        self.working.remove(key)
        now = self.clock.now
        # What was added for later while it was worked on stays as it is.
        again_now = self.owed.get(key, now + 1e9) <= now
        if not failed:
            self.earliest.pop(key, None)
            if again is not None:
                self.owed[key] = min(now + again, self.owed.get(key, now + 1e9))
        else:
            self.earliest[key] = now + max(1.0, again or 0.0)
            wait = min(8.0, 2.0 ** self.queue.failures(key))
            first = self.earliest[key] if again_now else max(now + wait, self.earliest[key])
            self.owed[key] = max(self.earliest[key], first if again_now else min(first, self.owed.get(key, first)))
        self.queue.done(key, failed=failed, again_in_s=again)

    @invariant()
    def waits_are_true(self) -> None:
        wait = self.queue.wait_s()
        free = [due for key, due in self.owed.items() if key not in self.working]
        if not free:
            assert wait is None
        else:
            assert wait == pytest.approx(max(0.0, min(free) - self.clock.now))


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
