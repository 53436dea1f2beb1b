"""The health state machine: hysteresis, and a model of it to compare with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.health import CONFIRM, FALL, RISE, Health, State


def test_the_first_report_decides() -> None:
    for report, state in ((Health.succeeded, State.UP), (lambda h: h.failed("x"), State.DOWN)):
        health = Health(lambda: 0.0)
        assert health.state is State.UNKNOWN
        assert health.usable
        assert report(health)
        assert health.state is state


def test_up_to_down_takes_failures_in_a_row() -> None:
    health = Health(lambda: 0.0)
    health.succeeded()
    for _ in range(5):
        for _ in range(FALL - 1):
            assert not health.failed("once")
        assert not health.succeeded()
        assert health.state is State.UP
    for _ in range(FALL - 1):
        health.failed("one")
    assert health.failed("two")
    assert (health.state, health.reason, health.usable) == (State.DOWN, "two", False)


def test_down_to_up_takes_successes_in_a_row() -> None:
    health = Health(lambda: 0.0)
    health.failed("gone")
    for _ in range(5):
        for _ in range(RISE - 1):
            assert not health.succeeded()
        assert not health.failed("again")
        assert health.state is State.DOWN
    for _ in range(RISE - 1):
        health.succeeded()
    assert health.succeeded()
    assert health.state is State.UP


def test_changes_are_confirmed_faster_and_dated() -> None:
    now = 10.0
    health = Health(lambda: now)
    assert health.since == 10
    now = 11.0
    health.succeeded()
    assert (health.since, health.next_check_s(2.0)) == (11, 2.0)
    health.failed("x")
    assert health.next_check_s(2.0) == 2.0 / CONFIRM
    now = 12.0
    health.failed("x")
    assert (health.since, health.next_check_s(2.0)) == (12, 2.0)


@given(st.lists(st.booleans(), max_size=60))
def test_state_is_what_the_last_run_of_reports_says(reports: list[bool]) -> None:
    health = Health(lambda: 0.0)
    expected, run, last = State.UNKNOWN, 0, None
    for report in reports:
        run = run + 1 if report == last else 1
        last = report
        before = health.state
        changed = health.succeeded() if report else health.failed("x")
        if expected is State.UNKNOWN or run >= (RISE if report else FALL):
            expected = State.UP if report else State.DOWN
        assert health.state is expected
        assert changed == (health.state is not before)


def test_a_judgement_replaces_what_was_found_here_and_says_what_the_one_before_was() -> None:
    now = 0.0
    health = Health(lambda: now)
    assert health.judged(State.UP, "") is State.UNKNOWN
    for _ in range(FALL):
        health.failed("refused")
    assert health.state is State.DOWN
    now = 5.0
    assert health.judged(State.UP, "refused") is State.UP  # it never was down for whoever judges
    assert (health.state, health.since, health.reason) == (State.UP, 5.0, "refused")
    assert health.judged(State.DOWN, "gone") is State.UP


def test_who_judges_is_told_of_each_failure_and_says_what_is_down() -> None:
    told: list[str] = []
    health = Health(lambda: 0.0, told.append)
    health.judged(State.UP, "")
    assert not any(health.failed("refused") for _ in range(FALL))
    assert told == ["refused"] * FALL
    assert health.state is State.DOWN, "a burst of requests need not wait for the judgement"
    assert not health.failed("again")
    assert told[FALL:] == ["again"]
