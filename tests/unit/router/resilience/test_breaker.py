"""The breaker against a model of it: when it opens, for how long, how many it lets through, and what it ignores."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.config import BreakerSettings
from router.resilience.breaker import SLOTS, Breaker, State

SETTINGS = BreakerSettings(
    failures=3, failure_ratio=0.5, min_requests=8, window_s=10, open_s=4, max_open_s=20, jitter=0.5, probes=2,
    successes=3,
)  # fmt: skip


class Scene:
    def __init__(self, settings: BreakerSettings = SETTINGS) -> None:
        self.now, self.luck = 1000.0, 0.0
        self.breaker = Breaker(settings, lambda: self.now, lambda: self.luck)

    def request(self, ok: bool | None) -> bool:
        return self.breaker.leave(self.breaker.enter(), ok)

    def opened(self) -> Scene:
        for _ in range(SETTINGS.failures):
            self.request(False)
        assert self.breaker.state is State.OPEN
        return self


def test_failures_in_a_row_open_it_and_others_do_not() -> None:
    scene = Scene()
    for _ in range(3):
        assert not scene.request(False)
        assert not scene.request(None)
        assert not scene.request(False)
        scene.now += 60
        assert not scene.request(True)
    assert not scene.request(False)
    assert not scene.request(False)
    assert scene.request(False)
    assert not scene.breaker.allows()


def test_a_share_of_failures_opens_it_when_there_were_enough_requests() -> None:
    scene = Scene()
    for _ in range(3):
        scene.request(True)
        assert not scene.request(False)
    scene.request(True)
    assert scene.request(False)  # 4 of 8
    assert scene.breaker.state is State.OPEN


def test_failures_of_long_ago_are_forgotten() -> None:
    scene = Scene()
    for _ in range(20):
        scene.request(False)
        scene.request(True)
        scene.now += SETTINGS.window_s / 3
        assert scene.breaker.state is State.CLOSED


def test_it_is_open_for_longer_each_time_with_a_random_part_on_top() -> None:
    scene = Scene().opened()
    for expected in (4, 8, 16, 20, 20):
        assert scene.breaker.until - scene.now == expected
        scene.now = scene.breaker.until
        assert scene.breaker.allows()
        assert scene.request(False)
    scene.luck, scene.now = 1.0, scene.breaker.until
    scene.request(False)
    assert scene.breaker.until - scene.now == 20 * 1.5


def test_after_a_good_time_it_begins_with_the_shortest_again() -> None:
    for calm, expected in ((SETTINGS.window_s, 4), (SETTINGS.window_s - 1, 16)):
        scene = Scene().opened()
        scene.now = scene.breaker.until
        scene.request(False)
        scene.now = scene.breaker.until
        for _ in range(SETTINGS.successes):
            scene.request(True)
        assert scene.breaker.state is State.CLOSED
        scene.now += calm
        scene.opened()
        assert scene.breaker.until - scene.now == expected


def test_half_open_lets_a_few_through_at_a_time() -> None:
    scene = Scene().opened()
    scene.now = scene.breaker.until
    periods = []
    while scene.breaker.allows():
        periods.append(scene.breaker.enter())
    assert len(periods) == SETTINGS.probes
    scene.breaker.leave(periods[0], None)  # a client that left says nothing, but its place is free
    assert scene.breaker.allows()


def test_many_requests_that_fail_together_open_it_once() -> None:
    scene = Scene()
    periods = [scene.breaker.enter() for _ in range(100)]
    changes = [scene.breaker.leave(period, False) for period in periods]
    assert changes.count(True) == 1
    assert scene.breaker.until - scene.now == SETTINGS.open_s
    scene.now = scene.breaker.until
    late = [scene.breaker.enter() for _ in range(2)]
    scene.breaker.leave(periods[0], False)  # asked before it opened
    assert scene.breaker.state is not State.OPEN
    assert late


def test_one_that_is_used_though_it_is_open_closes_when_that_goes_well() -> None:
    scene = Scene().opened()
    scene.request(False)
    assert scene.breaker.until - scene.now == SETTINGS.open_s  # no longer for it
    for _ in range(SETTINGS.successes - 1):
        assert not scene.request(True)
    assert scene.request(True)
    assert scene.breaker.state is State.CLOSED


def test_a_worker_that_came_back_is_probed_at_once() -> None:
    scene = Scene()
    scene.breaker.wake()
    assert scene.breaker.state is State.CLOSED
    scene.opened()
    scene.breaker.wake()
    assert scene.breaker.allows()
    for _ in range(SETTINGS.successes):
        scene.request(True)
    assert scene.breaker.state is State.CLOSED


def test_disabled_it_never_opens() -> None:
    scene = Scene(BreakerSettings(enabled=False, failures=1, min_requests=1))
    for _ in range(50):
        assert not scene.request(False)
        assert scene.breaker.allows()


class BreakerModel(RuleBasedStateMachine):
    """Requests that are let through come back in any order while time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.out: list[int] = []
        self.current: list[int] = []
        self.log: list[tuple[float, bool]] = []
        self.row = self.well = 0

    @property
    def breaker(self) -> Breaker:
        return self.scene.breaker

    @rule()
    def request(self) -> None:
        before = self.breaker.state
        if self.breaker.allows():
            self.current.append(self.breaker.enter())
        else:
            assert before is not State.CLOSED

    @precondition(lambda self: self.current)
    @rule(data=st.data(), ok=st.sampled_from([True, True, False, None]))
    def ends(self, data: st.DataObject, ok: bool | None) -> None:
        period = self.current.pop(data.draw(st.integers(0, len(self.current) - 1)))
        before, since = self.breaker.state, self.breaker.since
        changed = self.breaker.leave(period, ok)
        assert changed == (self.breaker.state is not before)
        if before is State.CLOSED and ok is not None:
            self.log.append((self.scene.now, not ok))
            self.row = 0 if ok else self.row + 1
        if before is State.HALF_OPEN and ok:
            self.well += 1
        expected = before
        if before is State.CLOSED and ok is False and (self.row >= SETTINGS.failures or self.share(since)):
            expected = State.OPEN
        elif before is State.HALF_OPEN and (ok is False or self.well >= SETTINGS.successes):
            expected = State.OPEN if ok is False else State.CLOSED
        assert self.breaker.state is expected
        if changed:
            self.out += self.current
            self.current, self.log, self.row, self.well = [], [], 0, 0

    def share(self, since: float) -> bool:
        width = SETTINGS.window_s / SLOTS
        oldest = int(self.scene.now / width) - SLOTS
        oldest = max(oldest, int(since / width))  # the part in which it closed says nothing
        recent = [failed for at, failed in self.log if int(at / width) > oldest]
        return len(recent) >= SETTINGS.min_requests and sum(recent) >= len(recent) * SETTINGS.failure_ratio

    @precondition(lambda self: self.out)
    @rule(ok=st.sampled_from([True, False, None]))
    def one_from_before_ends(self, ok: bool | None) -> None:
        before = self.breaker.state
        assert not self.breaker.leave(self.out.pop(), ok)
        assert self.breaker.state is before

    @rule(seconds=st.sampled_from([0.1, 1, 5, 40]), luck=st.sampled_from([0.0, 0.5, 1.0]))
    def time_passes(self, seconds: float, luck: float) -> None:
        self.scene.now += seconds
        self.scene.luck = luck

    @invariant()
    def it_holds_back_what_it_must(self) -> None:
        state, now = self.breaker.state, self.scene.now
        if state is State.OPEN:
            seconds = self.breaker.until - self.breaker.since
            assert SETTINGS.open_s <= seconds <= SETTINGS.max_open_s * (1 + SETTINGS.jitter)
            assert now >= self.breaker.until or not self.breaker.allows()
            assert not self.current
        elif state is State.HALF_OPEN:
            assert len(self.current) <= SETTINGS.probes
            assert self.breaker.allows() == (len(self.current) < SETTINGS.probes)
        else:
            assert self.breaker.allows()


TestBreaker = BreakerModel.TestCase
TestBreaker.settings = hypothesis_settings(max_examples=60, stateful_step_count=40)
