"""What a worker says of itself: ready, live, drained."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.launch.worker.life import COUNT_S, Life, Limits, Look

LIMITS = Limits(settle_s=5.0, drain_s=60.0, hang_s=100.0)


def good(at: float, requests: int = 0, counted: int | None = None, mark: bytes = b"") -> Look:
    return Look(
        at, "", computing=requests, running=requests, counted=requests if counted is None else counted, mark=mark
    )


def up(limits: Limits = LIMITS) -> Life:
    life = Life(limits)
    life.engine(0.0, True, "")
    return life


def test_it_is_ready_once_vllm_is_up_and_says_what_it_waits_for_before():
    life = Life(LIMITS)
    life.engine(0.0, False, "loading weights")
    assert (life.state.ready, life.state.live) == (False, True)
    assert life.state.why == "vLLM is not ready: loading weights"
    life.engine(90.0, True, "")
    assert (life.state.ready, life.state.live, life.state.why) == (True, True, "")


def test_a_start_that_takes_for_ever_is_no_reason_to_end_the_container():
    life = Life(LIMITS)
    for now in range(0, 5000, 10):
        life.engine(float(now), False, "compiling")
        assert life.state.live


def test_a_vllm_that_ends_makes_it_unready_until_it_is_back():
    life = up()
    life.engine(10.0, False, "starting again")
    assert (life.state.ready, life.state.live) == (False, True)
    life.engine(20.0, True, "")
    assert life.state.ready


def test_one_failed_look_is_nothing_two_make_it_unready_and_one_good_one_ready_again():
    life = up()
    life.looked(Look(1.0, "no answer"))
    assert life.state.ready
    life.looked(Look(2.0, "no answer"))
    assert life.state.why == "vLLM is not well: no answer"
    assert life.state.live
    life.looked(good(3.0))
    assert life.state.ready


def test_silence_beyond_the_limit_makes_it_not_live_and_a_sign_of_life_live_again():
    life = up()
    for at in range(1, 99):
        life.looked(Look(float(at), "no answer"))
    assert life.state.live
    life.engine(101.0, True, "")
    assert not life.state.live
    assert "has not answered /health for 100 s: no answer" in life.state.why
    life.looked(good(102.0))
    assert life.state.live
    assert life.state.ready


def test_requests_without_progress_beyond_the_limit_make_it_not_live():
    life = up()
    for at in range(1, 102):
        life.looked(good(float(at), requests=1, mark=b"same"))
    assert life.state.live
    life.looked(good(103.0, requests=1, mark=b"same"))
    assert not life.state.live
    assert "computed nothing for 100 s" in life.state.why
    life.looked(good(104.0, requests=1, mark=b"other"))
    assert life.state.live


def test_a_vllm_that_has_nothing_to_do_does_not_hang():
    life = up()
    for at in range(1, 1000):
        life.looked(good(float(at), mark=b"same"))
    assert life.state.live


def test_no_limit_no_hang():
    life = up(Limits(5.0, 60.0, 0.0))
    life.engine(1e6, True, "")
    assert life.state.live


def test_looks_at_the_one_that_ended_say_nothing_of_the_next():
    life = up()
    life.engine(10.0, False, "starting")
    life.engine(20.0, True, "")
    life.looked(Look(9.0, "no answer"))
    life.looked(Look(9.5, "no answer"))
    assert life.state.ready


def test_draining_ends_with_the_second_idle_look_after_routers_had_time():
    life = up()
    life.drain(10.0, "SIGTERM")
    assert not life.state.ready
    assert life.state.live
    life.withdrawn(11.0)
    for at in (11.0, 12.0, 14.9):
        life.looked(good(at))
    assert not life.state.drained, "a router that has not heard may send one"
    life.looked(good(15.0))
    assert not life.state.drained
    life.looked(good(16.0, requests=1))
    assert life.state.why == "draining: SIGTERM; requests under way: 1"
    life.looked(good(17.0))
    life.looked(good(18.0))
    assert (life.state.drained, life.state.cut) == (True, 0)


def test_nothing_is_drained_while_a_router_has_the_registration():
    life = up()
    life.drain(10.0, "SIGTERM")
    for at in range(15, 40):
        life.looked(good(float(at)))
    assert not life.state.drained
    life.withdrawn(40.0)
    life.looked(good(40.0))
    life.looked(good(41.0))
    assert life.state.drained


def test_the_deadline_cuts_what_is_under_way():
    life = up()
    life.drain(10.0, "SIGTERM")
    life.withdrawn(10.0)
    for at in range(11, 70):
        life.looked(good(float(at), requests=3, mark=str(at).encode()))
    assert not life.state.drained
    life.engine(70.0, True, "")
    assert (life.state.drained, life.state.cut) == (True, 3)


def test_metrics_that_can_not_be_read_are_no_idle_worker():
    life = up()
    life.drain(0.0, "SIGTERM")
    life.withdrawn(0.0)
    for at in range(6, 59):
        life.looked(Look(float(at), ""))
    assert not life.state.drained


def test_a_request_that_its_step_hides_is_seen_by_the_count():
    """vLLM's gauges show a request only after the step that begins it, which may take long."""
    life = up()
    life.drain(0.0, "SIGTERM")
    life.withdrawn(0.0)
    for at in range(6, 20):
        life.looked(good(float(at), requests=0, counted=1))
    assert not life.state.drained


def test_a_count_that_never_falls_is_not_believed_for_ever():
    life = up(Limits(5.0, 600.0, 100.0))
    life.drain(0.0, "SIGTERM")
    life.withdrawn(0.0)
    at = 0.0
    while not life.state.drained:
        at += 1.0
        life.looked(good(at, requests=0, counted=1, mark=b"same"))
    assert COUNT_S <= at <= COUNT_S + 3


@pytest.mark.parametrize("ended", [False, True])
def test_without_a_vllm_there_is_nothing_to_wait_for(ended):
    life = up() if ended else Life(LIMITS)
    life.drain(1.0, "SIGTERM")
    life.engine(2.0, False, "it has ended")
    assert (life.state.drained, life.state.cut) == (True, 0)


def test_one_that_hangs_is_not_waited_for():
    life = up()
    for at in range(1, 110):
        life.looked(good(float(at), requests=2, mark=b"same"))
    assert not life.state.live
    life.drain(110.0, "SIGTERM")
    assert life.state.drained
    life = up(Limits(settle_s=5.0, drain_s=60.0, hang_s=30.0))
    life.drain(0.0, "SIGTERM")
    for at in range(1, 40):
        life.looked(good(float(at), requests=2, mark=b"same"))
    assert (life.state.drained, life.state.cut) == (True, 2)


class Lives(RuleBasedStateMachine):
    """Anything in any order: what may never be, is not."""

    def __init__(self) -> None:
        super().__init__()
        self.life, self.now, self.is_up = Life(LIMITS), 0.0, False
        self.drain_at: float | None = None
        self.was_drained = False
        self.busy_at: float | None = None

    @rule(seconds=st.floats(0.1, 40.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.life.engine(self.now, self.is_up, "doing")

    @rule(is_up=st.booleans())
    def engine(self, is_up: bool) -> None:
        self.is_up = is_up
        self.life.engine(self.now, is_up, "doing")

    @rule(requests=st.integers(0, 2), failure=st.sampled_from(["", "", "no answer"]), mark=st.binary(max_size=1))
    def look(self, requests: int, failure: str, mark: bytes) -> None:
        if requests and self.is_up:
            self.busy_at = self.now
        self.life.looked(Look(self.now, failure, requests, requests, requests, mark))

    @rule()
    def drain(self) -> None:
        self.drain_at = self.now if self.drain_at is None else self.drain_at
        self.life.drain(self.now, "asked")

    @precondition(lambda self: self.drain_at is not None)
    @rule()
    def withdrawn(self) -> None:
        self.life.withdrawn(self.now)

    @invariant()
    def what_is_said_agrees(self) -> None:
        state = self.life.state
        assert not (state.ready and (state.draining or not state.live or not self.is_up))
        assert state.ready == (not state.why) or state.draining
        assert state.live or self.is_up, "one that starts, or has ended, is no reason to end the container"
        assert state.draining == (self.drain_at is not None)
        assert state.drained or not self.was_drained, "drained once, drained for ever"
        if self.drain_at is not None and self.now >= self.drain_at + LIMITS.drain_s + 40.0:
            self.life.engine(self.now, self.is_up, "")
            assert self.life.state.drained, "the deadline holds"
        self.was_drained = state.drained


TestLives = Lives.TestCase
