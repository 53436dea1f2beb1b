"""The small cores of fetching: budget, breaker, buffers, memory."""

from __future__ import annotations

import pytest

from heliosfs.fetch.breaker import Breaker, in_order
from heliosfs.fetch.budget import MAX_BUDGET, QUEUE_S, Link
from heliosfs.fetch.buffers import BufferPool
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
    assert MAX_CHUNK <= link.range_bytes <= max(MAX_CHUNK, link.budget / 4)


def test_the_budget_is_bounded() -> None:
    link = Link()
    drive(link, 5e9, 2)
    assert link.budget == MAX_BUDGET
    small = Link(cap=10 * MIB)
    drive(small, 5e9, 2)
    assert small.budget == 10 * MIB


def test_a_distant_source_is_used_fully() -> None:
    """200 ms away at 100 MB/s: the budget covers the round trip as well."""
    link = Link()
    drive(link, 100e6, 30, latency=0.2)
    assert link.rate > 80e6
    assert link.budget > 0.35 * 100e6


def test_a_burst_does_not_fill_the_queue() -> None:
    """A link that hands out the first bytes at once and is slow from then on."""
    link = Link()
    link.begin(0.0)
    link.received(0.001, MAX_CHUNK, 0.0)
    assert link.budget <= 2 * MAX_CHUNK
    link.end(0.001)
    drive(link, 20e6, 3, start=0.001)
    assert link.budget == pytest.approx(20e6 * QUEUE_S, rel=0.2)


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
    assert in_order(breakers, 10.0) == [0, 1, 2]
    breakers[0].failed(10.0)
    assert in_order(breakers, 10.0) == [1, 2, 0]
    breakers[1].failed(9.9)
    assert in_order(breakers, 10.0) == [2, 1, 0], "who is ready sooner comes first"
    assert in_order(breakers, 99.0) == [0, 1, 2]


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
