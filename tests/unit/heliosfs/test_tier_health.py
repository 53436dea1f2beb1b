"""When a failing disk is left alone, and for how long."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosfs.tiers.health import LONGEST_PAUSE_S, Health, State

FULL, READ_ONLY, BROKEN = (OSError(code, "") for code in (errno.ENOSPC, errno.EROFS, errno.EIO))


@pytest.mark.parametrize(
    ("error", "state", "readable"),
    [(FULL, State.FULL, True), (READ_ONLY, State.READ_ONLY, True), (BROKEN, State.AWAY, False)],
)
def test_what_a_failure_means(error: OSError, state: State, readable: bool) -> None:
    health = Health()
    assert health.failed(error, 10.0), "that is news"
    assert (health.state, health.readable, health.writable) == (state, readable, False)
    assert not health.failed(error, 10.1), "and this is not"
    assert not health.due(10.5)
    assert health.due(11.0)
    assert not health.due(11.0), "not again at once"
    health.works(11.0)
    assert health.writable
    assert health.readable


def test_worse_replaces_better_and_never_the_other_way_round() -> None:
    health = Health()
    assert [health.failed(error, 0.0) for error in (FULL, READ_ONLY, BROKEN)] == [True] * 3
    assert [health.failed(error, 0.0) for error in (READ_ONLY, FULL)] == [False] * 2
    assert health.state is State.AWAY


def test_one_that_fails_again_soon_is_left_alone_longer() -> None:
    health, now, pauses = Health(), 0.0, []
    for _ in range(9):
        health.failed(BROKEN, now)
        began = now
        while not health.due(now):
            now += 0.5
        pauses.append(now - began)
        health.works(now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    health.failed(BROKEN, now + 2 * LONGEST_PAUSE_S)
    assert health.due(now + 2 * LONGEST_PAUSE_S + 1)


@given(st.lists(st.tuples(st.sampled_from(["full", "ro", "io", "look"]), st.floats(0, 100))))
def test_it_is_always_looked_at_again(events: list[tuple[str, float]]) -> None:
    health, now = Health(), 0.0
    for event, passed in events:
        now += passed
        if event == "look":
            if health.due(now):
                health.works(now)
        else:
            health.failed({"full": FULL, "ro": READ_ONLY, "io": BROKEN}[event], now)
    assert health.writable or health.due(now + LONGEST_PAUSE_S)
