"""Limits: whatever happens in whatever order, nobody gets more than a bucket ever gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission.buckets import MAX_BUCKETS, Charge, LocalLimits, refusal_error


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def charge(amount: float, limit: float = 60, name: str = "the tenant a", unit: str = "tokens") -> Charge:
    return Charge(name, unit, limit, amount)  # type: ignore[arg-type]


steps = st.lists(st.tuples(st.floats(0, 90), st.floats(0.5, 70), st.floats(0, 1)), max_size=60)


@given(steps, st.sampled_from([10.0, 60.0, 600.0]))
def test_over_any_window_no_more_is_taken_than_the_limit_and_what_flows_in(steps, limit) -> None:
    clock = Clock()
    limits = LocalLimits(clock)
    taken = []
    for pause, amount, used in steps:
        clock.now += pause
        amount = min(amount, limit)
        if limits.try_take([charge(amount, limit)]) is None:
            used_now = amount * used
            limits.settle([charge(used_now - amount, limit)])
            taken.append((clock.now, used_now))
    for i, (begin, _) in enumerate(taken):
        for j in range(i, len(taken)):
            window = taken[j][0] - begin
            assert sum(amount for _, amount in taken[i : j + 1]) <= limit * (1 + window / 60) + 1e-6


@given(steps)
def test_who_waits_as_told_gets_it_and_not_before(steps) -> None:
    clock = Clock()
    limits = LocalLimits(clock)
    for pause, amount, _ in steps:
        clock.now += pause
        asked = charge(min(amount, 60))
        refusal = limits.try_take([asked])
        if refusal is not None:
            clock.now += refusal.wait_s * 0.99
            assert limits.try_take([asked]) is not None
            clock.now += refusal.wait_s * 0.01 + 1e-6
            assert limits.try_take([asked]) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(1, 60), st.floats(0, 30)), max_size=40))
def test_all_buckets_or_none(asks) -> None:
    """A refusal by one bucket costs the others nothing."""
    clock = Clock()
    both, alone = LocalLimits(clock), LocalLimits(clock)
    for _, amount, pause in asks:
        clock.now += pause
        pair = [charge(amount, 60, "the key k"), charge(amount, 90, "the model m")]
        if both.try_take(pair) is None:
            assert alone.try_take(pair[:1]) is None
            assert alone.try_take(pair[1:]) is None
    for name, limit in (("the key k", 60), ("the model m", 90)):
        probes = [charge(amount, limit, name) for amount in range(1, limit)]
        assert [both.try_take([p]) is None for p in probes] == [alone.try_take([p]) is None for p in probes]


@given(steps, st.integers(2, 5))
def test_parts_together_give_what_one_gives_and_an_odd_request_each(steps, processes) -> None:
    """Where no memory is shared: whichever process a client comes to, over any window, it is the limit and a bit."""
    clock, limit = Clock(), 60.0
    parts = [LocalLimits(clock, processes, lambda name: None) for _ in range(processes)]
    taken = []
    for pause, amount, which in steps:
        clock.now += pause
        amount = min(amount, limit)
        if parts[int(which * 0.999 * processes)].try_take([charge(amount, limit)]) is None:
            taken.append((clock.now, amount))
    for i, (begin, _) in enumerate(taken):
        for j in range(i, len(taken)):
            window = taken[j][0] - begin
            beyond = processes * (limit - limit / processes)  # each may be owed one request of the whole limit
            assert sum(amount for _, amount in taken[i : j + 1]) <= limit * (1 + window / 60) + beyond + 1e-6


def test_a_request_that_costs_more_than_a_processs_part_takes_a_full_bucket_and_is_paid_off() -> None:
    clock = Clock()
    limits = LocalLimits(clock, 4, lambda name: None)  # 15 of 60
    assert limits.try_take([charge(40)]) is None
    refusal = limits.try_take([charge(40)])
    assert refusal is not None
    assert refusal.charge.limit == 60  # what clients are told is the whole
    assert refusal.wait_s == pytest.approx(160)  # 25 owed and 15 to be full, 15 a minute
    clock.now += 160.001
    assert limits.try_take([charge(40)]) is None


def test_what_was_used_beyond_the_estimate_is_paid_before_others_pass() -> None:
    clock = Clock()
    limits = LocalLimits(clock)
    assert limits.try_take([charge(10)]) is None
    limits.settle([charge(110)])  # it used 120
    refusal = limits.try_take([charge(1)])
    assert refusal is not None
    assert refusal.wait_s == pytest.approx(61)  # 60 owed and one to take, one a second
    error = refusal_error(refusal)
    assert (error.status, error.code, error.retry_after_s, error.type) == (429, "rate_limit_exceeded", 61, "tokens")


def test_a_bucket_never_holds_more_than_a_minute_even_when_much_comes_back() -> None:
    clock = Clock()
    limits = LocalLimits(clock)
    limits.settle([charge(-1000)])
    clock.now += 1e6
    assert limits.try_take([charge(60)]) is None
    assert limits.try_take([charge(1)]) is not None


def test_full_buckets_of_many_are_forgotten_and_others_are_not() -> None:
    clock = Clock()
    limits = LocalLimits(clock)
    assert limits.try_take([charge(60, 60, "busy")]) is None
    for number in range(MAX_BUCKETS):
        limits.settle([charge(0, 60, str(number))])
    limits.try_take([charge(1, 60, "one more")])
    assert len(limits._buckets) == 2
    assert limits.try_take([charge(1, 60, "busy")]) is not None
