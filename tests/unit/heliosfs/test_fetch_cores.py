"""The small cores of fetching: budget, width, pace, breaker, buffers, memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosfs.fetch.breaker import Breaker, in_order
from heliosfs.fetch.budget import MAX_BUDGET, MAX_RANGE, QUEUE_S, START_BUDGET, Link
from heliosfs.fetch.buffers import BufferPool
from heliosfs.fetch.pace import MOST_PART, SILENT_S, SLOW_S, WAITED_S, Pace, patience_s
from heliosfs.fetch.width import Width
from heliosfs.store.recipe import MAX_CHUNK

MIB = 1 << 20


def drive(link: Link, rate: float, seconds: float, latency: float = 0.0, start: float = 0.0) -> float:
    """A source that delivers ``rate`` bytes a second, after ``latency``, kept as busy as the budget allows."""
    now, end = start, start + seconds
    link.begin(now)
    while now < end:
        sent = link.budget
        now += max(sent / rate, latency + MAX_CHUNK / rate)
        link.received(now, sent, latency)
    link.end(now)
    return now


@pytest.mark.parametrize("rate", [2e6, 50e6, 200e6])
def test_the_budget_is_a_quarter_second_of_the_link(rate: float) -> None:
    link = Link()
    drive(link, rate, 5)
    assert link.budget == pytest.approx(max(MAX_CHUNK, rate * QUEUE_S), rel=0.1)
    assert MAX_CHUNK <= link.range_bytes(8) <= max(MAX_CHUNK, link.budget / 4)


def test_the_budget_is_bounded() -> None:
    link = Link()
    drive(link, 5e9, 2)
    assert link.budget == MAX_BUDGET
    assert link.range_bytes(8) == MAX_RANGE


def test_it_begins_on_every_connection_at_once() -> None:
    link = Link()
    assert link.range_bytes(8) * 8 <= link.budget == START_BUDGET


def test_a_distant_source_is_used_fully() -> None:
    """200 ms away at 100 MB/s: the budget covers the round trip as well."""
    link = Link()
    drive(link, 100e6, 30, latency=0.2)
    assert link.rate > 80e6
    assert link.budget > 0.35 * 100e6


def test_a_slow_link_is_soon_known() -> None:
    """It hands out the first bytes at once and is slow from then on: within half a second no more is asked for."""
    link = Link()
    link.begin(0.0)
    link.received(0.001, MAX_CHUNK, 0.0)
    assert not link.settled
    assert link.budget == START_BUDGET, "a burst says nothing"
    for step in range(1, 41):
        link.received(step * 0.1, int(2e6 * 0.1), 0.0)
    assert link.settled
    assert link.budget == MAX_CHUNK
    link.end(4.0)


def test_a_slow_start_is_no_slow_link() -> None:
    """Bytes that double with each round trip of 20 ms: what is asked for never falls below what the link can carry."""
    link, now, window = Link(), 0.0, 100_000.0
    link.begin(now)
    for _ in range(60):
        now += 0.02
        link.received(now, int(min(window, 500e6 * 0.02)), 0.02)
        window *= 2
        assert link.budget >= 500e6 * 0.02
    assert link.rate > 250e6
    link.end(now)


def drive_width(width: Width, rate_of: dict[int, float] | float, seconds: float, *, full: bool = True) -> None:
    """A source that gives a rate for each number of connections: so much each, up to its link."""
    for step in range(int(seconds / 0.1)):
        link = rate_of if isinstance(rate_of, float) else rate_of[0]
        each = link / 8 if isinstance(rate_of, float) else rate_of[1]
        width.look(step * 0.1, min(link, width.count * each), full)


def test_more_connections_where_they_help() -> None:
    """A long fat link: 30 MB/s a connection, 800 MB/s in all."""
    width = Width(8, 32)
    drive_width(width, {0: 800e6, 1: 30e6}, 8.0)
    assert 24 <= width.count <= 32


def test_no_more_connections_where_they_do_not_help() -> None:
    """Eight of them fill the link: others are tried for a moment, ever more rarely."""
    width = Width(8, 32)
    tried = 0
    for step in range(6000):
        width.look(step * 0.1, 100e6, True)
        tried += width.count > 8
    assert width.count <= 12
    assert tried < 6000 * 0.05
    idle = Width(8, 32)
    drive_width(idle, {0: 800e6, 1: 30e6}, 8.0, full=False)
    assert idle.count == 8, "who does not use what there is needs no more"


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 1e9), st.booleans()), max_size=80), st.integers(1, 40))
def test_the_width_keeps_its_bounds(looks: list[tuple[float, float, bool]], start: int) -> None:
    width, now = Width(start, 32), 0.0
    for passed, rate, full in looks:
        now += passed
        width.look(now, rate, full)
        assert start <= width.count <= max(start, 32)


def test_patience() -> None:
    assert patience_s(True, 0.0, 30) == WAITED_S < patience_s(False, 0.0, 30) == SILENT_S
    assert patience_s(True, 0.2, 30) > 0.8 + WAITED_S - 1e-9, "a distant source is given its round trips"
    assert patience_s(False, 5.0, 3.0) == MOST_PART * 3.0


def test_a_pace_is_silent_slow_or_fine() -> None:
    pace = Pace(0.0)
    total = 0
    for step in range(1, 31):
        assert not pace.slow(1e9) or step * 0.1 > SLOW_S, "too early to say"
        total += 10_000
        assert pace.look(step * 0.1, total, False) == 10_000
        assert not pace.silent(step * 0.1, 0.6)
    assert pace.rate == pytest.approx(100_000, rel=0.1)
    assert pace.slow(1e6)
    assert not pace.slow(500_000)
    pace.look(3.5, total, False)
    assert pace.silent(3.6, 0.6)
    pace.look(4.0, total, True)
    assert not pace.silent(4.5, 0.6), "it was at the disk meanwhile"


def test_idle_time_does_not_count() -> None:
    link = Link()
    now = drive(link, 100e6, 3)
    rate = link.rate
    link.begin(now + 1000)
    link.received(now + 1000 + MAX_CHUNK / 100e6, MAX_CHUNK, 0.0)
    assert link.rate == pytest.approx(rate, rel=0.05)


def test_the_breaker_pauses_longer_each_time() -> None:
    breaker = Breaker(1.0, 5.0)
    now, pauses = 0.0, []
    for _ in range(5):
        assert breaker.ready(now)
        assert breaker.failed(now)
        assert not breaker.failed(now + 0.01), "the same moment"
        pauses.append(breaker.until - now)
        now = breaker.until
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    breaker.worked()
    assert breaker.ready(now)
    assert breaker.failures == 0


def test_the_order_of_sources() -> None:
    breakers = [Breaker(), Breaker(), Breaker()]

    def order(now: float) -> list[int]:
        return in_order([breaker.until for breaker in breakers], now)

    assert order(10.0) == [0, 1, 2]
    breakers[0].failed(10.0)
    assert order(10.0) == [1, 2, 0]
    breakers[1].failed(9.9)
    assert order(10.0) == [2, 1, 0], "who is ready sooner comes first"
    assert order(99.0) == [0, 1, 2]


def test_the_pool_is_bounded_and_reuses() -> None:
    pool = BufferPool.of_mib(12)
    assert pool.free == 3
    taken = [pool.take() for _ in range(3)]
    assert pool.take() is None
    assert pool.free == 0
    first = taken[0]
    assert first is not None
    assert len(first) == MAX_CHUNK
    pool.give(first)
    assert pool.take() is first
    assert BufferPool.of_mib(1).free == 2
