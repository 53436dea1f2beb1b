"""When a worker that ended is started again: whatever happens in whatever order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helios.launch.restarts import FIRST_S, MOST_S, STEADY_S, TRIES, USAGE, Restarts


def pauses(restarts: Restarts, count: int, now: float = 0.0) -> list[float]:
    found = []
    for _ in range(count):
        again = restarts.ended(now, 1)
        assert again is not None
        found.append(again - now)
        now = again
    return found


def test_pauses_double_up_to_a_minute_and_begin_anew_after_it_worked_for_a_while():
    restarts = Restarts()
    restarts.up(0.0)
    assert pauses(restarts, 8, 1.0) == [1, 2, 4, 8, 16, 32, 60, 60]
    restarts.up(1000.0)
    assert pauses(restarts, 1, 1000.0 + STEADY_S - 1) == [60]
    restarts.up(2000.0)
    assert pauses(restarts, 2, 2000.0 + STEADY_S) == [1, 2]


def test_one_that_was_never_up_is_given_up():
    restarts = Restarts()
    assert pauses(restarts, TRIES - 1) == [1, 2]
    assert restarts.ended(9.0, 1) is None
    assert restarts.tries == TRIES


def test_wrong_arguments_are_not_tried_again():
    assert Restarts().ended(0.0, USAGE) is None
    restarts = Restarts()
    restarts.up(0.0)
    assert restarts.ended(1.0, USAGE) is not None, "it took them once"


EIGHTHS = st.integers(0, 8000).map(lambda number: number / 8)
"""Seconds whose sums and differences are exact: 120.0 s after 1863.47 s may be less than 120 s later."""


@given(st.lists(st.tuples(st.booleans(), EIGHTHS, st.sampled_from([1, USAGE, 137]))))
def test_who_was_up_once_always_comes_again_within_a_minute(course: list[tuple[bool, float, int]]) -> None:
    restarts, now, was_up, failed = Restarts(), 0.0, False, 0
    last_s = FIRST_S / 2
    for comes_up, lives_s, status in course:
        if comes_up:
            restarts.up(now)
            was_up = True
        now += lives_s
        again = restarts.ended(now, status)
        if not was_up:
            failed += 1
            assert (again is None) == (failed >= TRIES or status == USAGE)
            if again is None:
                return
        assert again is not None
        pause_s = again - now
        assert FIRST_S <= round(pause_s, 6) <= MOST_S
        if comes_up and lives_s >= STEADY_S:
            last_s = FIRST_S / 2
        assert round(pause_s, 6) == min(MOST_S, 2 * last_s)
        last_s, now = round(pause_s, 6), again
