"""When pulls try again: a clock of our own, no waiting."""

import time
from email.utils import formatdate

import pytest

from helios.errors import DeadlineExceeded, Unavailable
from registry.pull.retry import LONGEST_DELAY_S, LONGEST_RATE_LIMIT_S, Gate, Retry, Transient, asked_wait


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(retry: Retry, clock: Clock, error: Transient) -> list[float]:
    """Fail until it gives up; the delays on the way."""
    delays = []
    for _ in range(1000):
        try:
            delays.append(retry.failed(error))
        except Unavailable as given_up:
            return [*delays, given_up]
        clock.now += delays[-1]
    raise AssertionError("it never gives up")


def test_delays_grow_and_end_at_the_deadline():
    clock = Clock()
    *delays, error = run(Retry(120, clock, lambda: 1.0), clock, Transient("x: status 503"))
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(delays) == LONGEST_DELAY_S
    assert 100 <= clock.now - 100 <= 120
    assert type(error) is Unavailable
    assert "status 503" in error.message
    assert "is kept" in error.hint


def test_time_outs_end_as_deadline_exceeded():
    clock = Clock()
    assert type(run(Retry(5, clock, lambda: 0.0), clock, Transient("slow", timed_out=True))[-1]) is DeadlineExceeded


def test_progress_starts_the_deadline_anew():
    clock = Clock()
    retry = Retry(10, clock, lambda: 1.0)
    for _ in range(100):
        clock.now += 9
        assert retry.failed(Transient("x")) == 0.5
        retry.progress()


def test_a_rate_limit_is_obeyed_and_does_not_count_as_a_stall():
    clock = Clock()
    retry = Retry(10, clock, lambda: 0.25)
    assert retry.failed(Transient("429", wait_s=300)) == 300.25
    clock.now += 300.25
    assert retry.failed(Transient("x")) < 1


def test_a_rate_limit_without_end_is_reported():
    clock = Clock()
    *waits, error = run(Retry(10, clock, lambda: 0.0), clock, Transient("429", wait_s=60))
    assert waits == [60.0] * 8
    assert "HF_TOKEN" in error.hint
    with pytest.raises(Unavailable, match="asks to wait 4000 s"):
        Retry(10, clock).failed(Transient("429", wait_s=4000))


def test_waiting_at_the_gate_does_not_count_as_a_stall():
    clock = Clock()
    retry = Retry(10, clock, lambda: 0.0)
    clock.now += 60
    retry.excuse(60)
    assert retry.failed(Transient("x")) > 0


def test_one_gate_for_all():
    clock = Clock()
    gate = Gate(clock)
    assert gate.left() == 0
    gate.close_for(30)
    gate.close_for(10)
    clock.now += 12
    assert gate.left() == 18
    clock.now += 20
    assert gate.left() == 0


NOW = time.time()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "7"}, 55),
        ({"ratelimit": '"resolvers" ; r = 0 ; t = 3'}, 3),
        ({"ratelimit": '"burst";r=7;t=1, "daily";r=0;t=900, "hourly";r=0;t=60'}, 900),
        ({"ratelimit": '"a, b; t=5";r=0;t=55;pk=:c2FsdA==:'}, 55),
        ({"ratelimit": '"api";r=3', "retry-after": "9"}, 9),
        ({"ratelimit": '"' * 3000 + ";t=5"}, None),
        ({"retry-after": "120"}, 120),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_what_a_429_asks_for(headers, seconds):
    assert asked_wait(headers, NOW) == seconds


@pytest.mark.parametrize(
    ("headers", "seconds", "quota"),
    [
        ({"ratelimit": '"api";r=1;t=55'}, 0, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55, None),
        ({"ratelimit": '"api";r=0;t=90000'}, LONGEST_RATE_LIMIT_S, None),
        (
            {
                "ratelimit": '"burst";r=40;t=3, "api";r=0;t=20',
                "ratelimit-policy": '"burst";q=100;w=10, "fixed window";"api";q=500;w=300',
            },
            20,
            (500, 300),
        ),
        ({"retry-after": "30"}, 0, None),
    ],
)
def test_the_last_request_that_is_allowed_holds_back_the_next(headers, seconds, quota):
    """Before a 429 says so; what the upstream counts by itself goes on."""
    gate = Gate(Clock())
    gate.heed(headers, "api")
    assert (gate.left("api"), gate.left("files"), gate.quota) == (seconds, 0, quota)


def test_retry_after_may_be_a_date():
    assert 58 <= asked_wait({"retry-after": formatdate(NOW + 60, usegmt=True)}, NOW) <= 60
    assert asked_wait({"retry-after": formatdate(NOW - 60, usegmt=True)}, NOW) == 0
