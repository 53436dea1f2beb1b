"""The breaker of several processes: what one finds counts in all, and none that dies leaves it as it must not be."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.config import BreakerSettings, OutlierSettings, RouterSettings
from router.processes.board import LOADS, Board
from router.resilience.breaker import Breaker, State
from router.resilience.cells import COLUMNS, Cells
from router.resilience.guard import Attempt, Guard
from router.resilience.outcome import Outcome
from tests.support.interleaving import Stage, WatchedCells

PROCESSES = 3
SETTINGS = BreakerSettings(
    failures=3, failure_ratio=0.5, min_requests=8, window_s=10, open_s=4, max_open_s=20, jitter=0.5, probes=2,
    successes=2,
)  # fmt: skip


class Scene:
    """Processes with a mapping of the board each."""

    def __init__(self, watch: Callable[[Cells], Cells] = lambda cells: cells) -> None:
        self.now, self.watch = 1000.0, watch
        self.board = Board.make(PROCESSES, LOADS + COLUMNS, rows=2)
        self.breakers = [self.start(slot) for slot in range(PROCESSES)]

    def start(self, slot: int) -> Breaker:
        cells = self.watch(Board(self.board.fd).row("w", slot))
        return Breaker(SETTINGS, lambda: self.now, lambda: 0.0, cells)

    def dies(self, slot: int) -> None:
        """And is replaced."""
        self.board.clear(slot)
        self.breakers[slot] = self.start(slot)

    def request(self, slot: int, ok: bool | None) -> bool:
        breaker = self.breakers[slot]
        return breaker.leave(breaker.enter(), ok)

    @property
    def states(self) -> set[State]:
        return {breaker.state for breaker in self.breakers}

    def opened(self) -> Scene:
        for slot in range(SETTINGS.failures):
            self.request(slot % PROCESSES, False)
        assert self.states == {State.OPEN}
        return self

    def heals(self) -> None:
        """Whatever happened: once its time is over somebody may probe, and when that goes well it is closed in all."""
        self.now += SETTINGS.max_open_s * 2
        for _ in range(SETTINGS.successes):
            if self.states == {State.CLOSED}:
                break
            slot = next(slot for slot, breaker in enumerate(self.breakers) if breaker.allows())
            self.request(slot, True)
        assert self.states == {State.CLOSED}

    def close(self) -> None:
        os.close(self.board.fd)


def test_failures_of_all_processes_open_it_in_all_and_a_success_of_one_ends_the_row() -> None:
    scene = Scene()
    assert not scene.request(0, False)
    assert not scene.request(1, False)
    assert not scene.request(2, True)
    assert not scene.request(0, False)
    assert not scene.request(1, False)
    assert scene.request(2, False)
    assert not any(breaker.allows() for breaker in scene.breakers)
    scene.close()


def test_one_process_probes_at_a_time_and_its_death_lets_another_one() -> None:
    scene = Scene().opened()
    scene.now += SETTINGS.open_s
    prober = scene.breakers[1]
    assert [breaker.allows() for breaker in scene.breakers] == [True] * 3
    periods = [prober.enter()]
    assert [breaker.allows() for breaker in scene.breakers] == [False, True, False]
    periods.append(prober.enter())
    assert not any(breaker.allows() for breaker in scene.breakers)
    scene.dies(1)
    assert [breaker.allows() for breaker in scene.breakers] == [True] * 3
    assert scene.request(0, True) or scene.request(2, True)
    assert scene.states == {State.CLOSED}
    scene.close()


def test_what_another_process_found_is_heard_of_and_is_not_counted_twice() -> None:
    board = Board.make(2, LOADS + COLUMNS)
    now = [1000.0]
    settings = RouterSettings(breaker=SETTINGS, outliers=OutlierSettings(min_requests=2, eject_s=10, interval_s=10))
    one, two = (
        Guard("w", settings, lambda: now[0], lambda: 0.0, cells=Board(board.fd).row("w", slot)) for slot in range(2)
    )

    def answers(guard: Guard, outcome: Outcome, times: int = 1) -> None:
        for _ in range(times):
            attempt = Attempt(guard, now[0], engine=True)
            attempt.outcome = outcome
            attempt.end()

    moment = board.moment
    under_way = Attempt(two, now[0], engine=True)
    answers(one, Outcome.FAILED, 3)
    assert moment != board.moment  # two looks, sooner or later
    assert (one.admits(), two.clear) == (False, True)
    under_way.end()  # or sees it with its next request
    assert (two.clear, two.admits()) == (False, False)
    now[0] += SETTINGS.open_s
    answers(two, Outcome.OK, 2)
    one.refresh()
    assert one.clear

    answers(two, Outcome.OK, 2)
    assert two.standing(now[0]) is not None
    one.eject("slow")
    two.refresh()
    assert (two.ejected, two.admits(), two.ejection.count) == (True, False, 1)
    answers(two, Outcome.FAILED, 1)
    assert two.standing(now[0]) is None  # it is counted anew
    assert two.asked == 0
    now[0] += 10.5
    assert one.admits()
    for guard in (one, two):  # each says so, once an interval
        guard.spared()
    assert two.ejection.count == 0
    os.close(board.fd)


def test_a_configuration_without_breakers_and_ejections_finds_none_that_one_before_it_left() -> None:
    scene = Scene().opened()
    settings = RouterSettings(breaker=BreakerSettings(enabled=False), outliers=OutlierSettings(enabled=False))
    before, after = (
        Guard("w", one, lambda: scene.now, lambda: 0.0, cells=Board(scene.board.fd).row("w", 0))
        for one in (RouterSettings(), settings)
    )
    before.eject("slow")
    assert (before.clear, before.admits()) == (False, False)
    assert (after.clear, after.breaker.state, after.ejected) == (True, State.CLOSED, False)
    for _ in range(20):
        attempt = Attempt(after, scene.now, engine=True)
        attempt.outcome = Outcome.FAILED
        attempt.end()
        assert after.admits()
    scene.close()


class SharedBreaker(RuleBasedStateMachine):
    """Requests of three processes, one of which dies now and then, beside a model: one list of what has happened."""

    @initialize()
    def begin(self) -> None:
        self.scene = Scene()
        self.under_way: list[tuple[int, int]] = []
        self.row: list[int] = []
        self.well: list[int] = []
        self.log: list[tuple[int, bool]] = []
        self.at = self.scene.now

    @rule(slot=st.integers(0, PROCESSES - 1))
    def request(self, slot: int) -> None:
        breaker = self.scene.breakers[slot]
        if breaker.allows():
            self.under_way.append((slot, breaker.enter()))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), ok=st.sampled_from([True, True, False, False, None]))
    def ends(self, data: st.DataObject, ok: bool | None) -> None:
        slot, period = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        breaker = self.scene.breakers[slot]
        before = breaker.state
        present = breaker._period == period
        changed = breaker.leave(period, ok)
        expected = before
        if present and before is State.CLOSED and ok is not None:
            self.row = [] if ok else [*self.row, slot]
            self.log.append((slot, not ok))
            failed = sum(one for _, one in self.log)
            share = len(self.log) >= SETTINGS.min_requests and failed * 2 >= len(self.log)
            if ok is False and (len(self.row) >= SETTINGS.failures or share):
                expected = State.OPEN
        elif present and before is State.HALF_OPEN and ok is not None:
            self.well.append(slot)
            if not ok or len(self.well) >= SETTINGS.successes:
                expected = State.CLOSED if ok else State.OPEN
        assert self.scene.states == {expected}
        assert changed == (expected is not before)
        if changed:
            self.row, self.well, self.log = [], [], []
            # The part of the window in which it closed says nothing, so the model goes on from the next.
            self.scene.now = (self.scene.now // 1 + 1) * 1.0

    @rule(slot=st.integers(0, PROCESSES - 1))
    def dies(self, slot: int) -> None:
        self.scene.dies(slot)
        self.under_way = [one for one in self.under_way if one[0] != slot]
        self.row = [one for one in self.row if one != slot]
        self.well = [one for one in self.well if one != slot]
        self.log = [one for one in self.log if one[0] != slot]

    @rule(seconds=st.sampled_from([1.0, 5.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.scene.now += seconds
        self.log = []
        if seconds < SETTINGS.window_s:  # what is in the window is another test's
            self.scene.now += SETTINGS.window_s

    @invariant()
    def one_process_probes(self) -> None:
        if hasattr(self, "scene") and self.scene.states == {State.HALF_OPEN}:
            period = self.scene.breakers[0]._period
            probing = [slot for slot, one in self.under_way if one == period]
            assert len(set(probing)) <= 1
            assert len(probing) <= SETTINGS.probes
            allowed = [slot for slot, breaker in enumerate(self.scene.breakers) if breaker.allows()]
            if not probing:
                assert allowed == list(range(PROCESSES))
            else:
                assert allowed == (probing if len(probing) < SETTINGS.probes else [])

    def teardown(self) -> None:
        if hasattr(self, "scene"):
            for slot in range(PROCESSES):
                self.scene.dies(slot)
            self.scene.heals()
            self.scene.close()


TestSharedBreaker = SharedBreaker.TestCase
TestSharedBreaker.settings = hypothesis_settings(max_examples=40, stateful_step_count=25)

deeds = st.lists(
    st.lists(st.sampled_from(["well", "badly", "badly", "leaves"]), min_size=1, max_size=4),
    min_size=PROCESSES, max_size=PROCESSES,
)  # fmt: skip


@given(rounds=st.lists(deeds, min_size=1, max_size=4), seed=st.integers(0, 1 << 32))
@hypothesis_settings(max_examples=25, deadline=None)
def test_in_whatever_order_words_are_written_and_whoever_dies_in_between_it_stays_a_breaker(
    rounds: list[list[list[str]]], seed: int
) -> None:
    stage = Stage(seed, deaths=0.02)
    scene = Scene(lambda cells: WatchedCells(stage, cells))
    outcomes: dict[str, bool | None] = {"well": True, "badly": False, "leaves": None}
    probing: dict[int, int] = {}
    most = 0

    def process(slot: int, texts: list[str]) -> Callable[[], None]:
        def requests() -> None:
            nonlocal most
            breaker = scene.breakers[slot]
            under_way = []
            for text in texts:
                if breaker.allows():
                    under_way.append((breaker.enter(), text))
                    if (period := under_way[-1][0]) & 1:
                        probing[period] = probing.get(period, 0) + 1
                        most = max(most, probing[period])
            for period, text in under_way:
                if period & 1:
                    probing[period] -= 1
                breaker.leave(period, outcomes[text])

        return requests

    for texts in rounds:
        scene.now += 5
        probing.clear()
        stage.dead.clear()
        stage.run(*(process(slot, texts[slot]) for slot in range(PROCESSES)))
        for slot in stage.dead:
            scene.dies(slot)
        assert len(scene.states) == 1
        assert scene.breakers[0].until - scene.now <= SETTINGS.max_open_s
    # Probes beyond the bound: one of each further process, which looked in the same moment.
    assert most <= SETTINGS.probes + PROCESSES - 1
    scene.heals()
    for number in range(SETTINGS.failures):
        scene.request(number % PROCESSES, False)
    assert scene.states == {State.OPEN}
    scene.close()


def test_processes_that_fail_at_once_open_it_once() -> None:
    for seed in range(40):
        stage = Stage(seed)
        scene = Scene(lambda cells, stage=stage: WatchedCells(stage, cells))  # type: ignore[misc]
        under_way = [[breaker.enter() for _ in range(5)] for breaker in scene.breakers]

        def fail(breaker: Breaker, periods: list[int]) -> Callable[[], Any]:
            return lambda: [breaker.leave(period, False) for period in periods]

        stage.run(*(fail(*one) for one in zip(scene.breakers, under_way, strict=True)))
        assert scene.states == {State.OPEN}
        assert scene.breakers[0].until - scene.now == SETTINGS.open_s  # not longer, though all have found it
        scene.close()
