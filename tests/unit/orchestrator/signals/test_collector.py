"""What several routers say, summed: what isn't known is never 0, and what came is never missed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.demand import Answers, Demand, Held, Line, Model, Reading, Role, Times, Waiting
from orchestrator.scaling.signals import UNHEARD
from orchestrator.signals.collector import Collector
from orchestrator.signals.sampler import Sampler
from orchestrator.signals.window import Outcomes, Window, quantile, weighted

STALE_S, WINDOW_S = 10.0, 300.0
BOUNDS = (0.1, 0.5, 1.0)


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Router:
    """A replica, as it really is."""

    clock: Clock
    epoch: int = 1
    total: int = 0
    held: int = 0
    flying: int = 0
    last_at: float | None = None
    ok: int = 0
    complete: bool = True
    readings: tuple[Reading, ...] = ()
    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0])

    def document(self, model: str = "m") -> Demand:
        idle_s = None if self.last_at is None else self.clock.now - self.last_at
        waiting = Waiting(self.held, self.held * 10, 1.0, "worker") if self.held else None
        role = Role("both", "r1", 1, 1, self.flying, self.flying * 7, 0, self.readings)
        answers = Answers("r1", self.ok, 0, 0, 0, Times(BOUNDS, tuple(self.counts), 0.0))
        models = (Model(model, self.total, idle_s, waiting, (role,), (answers,)),)
        return Demand(str(self.epoch), self.complete, False, models)

    def line(self) -> Line:
        held = (Held("m", Waiting(self.held, self.held * 10, 1.0, "worker")),) if self.held else ()
        return Line(str(self.epoch), True, held)


class Replicas(RuleBasedStateMachine):
    """Routers that come, go, start anew and fall silent."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.collector = Collector(self.clock, stale_s=STALE_S, window_s=WINDOW_S)
        self.routers: dict[str, Router] = {}
        self.heard: dict[str, tuple[float, int, int]] = {}
        """When each was heard last, and what it had: held and in flight."""
        self.number = 0
        self.unseen = 0
        """Requests that came since their router was heard last."""
        self.came = 0
        self.before = 0

    @rule()
    def comes(self) -> None:
        self.number += 1
        self.routers[f"r{self.number}"] = Router(self.clock)
        self.collector.expect(self.routers)

    @precondition(lambda self: self.routers)
    @rule(data=st.data())
    def goes(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.routers)))
        del self.routers[name]
        self.heard.pop(name, None)
        self.collector.expect(self.routers)

    @precondition(lambda self: self.routers)
    @rule(data=st.data(), held=st.integers(0, 3), flying=st.integers(0, 3), gone=st.integers(0, 2))
    def works(self, data: st.DataObject, held: int, flying: int, gone: int) -> None:
        one = self.routers[data.draw(st.sampled_from(sorted(self.routers)))]
        self.clock.now += 0.5
        one.held, one.flying = held, flying
        one.total += gone
        one.ok += gone
        one.counts[1] += gone
        if gone:
            one.last_at = self.clock.now

    @precondition(lambda self: self.routers)
    @rule(data=st.data())
    def starts_anew(self, data: st.DataObject) -> None:
        one = self.routers[data.draw(st.sampled_from(sorted(self.routers)))]
        one.epoch += 1
        one.total = one.ok = one.held = one.flying = 0
        one.counts = [0, 0, 0, 0]
        one.last_at = None

    @precondition(lambda self: self.routers)
    @rule(data=st.data())
    def is_heard(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.routers)))
        one = self.routers[name]
        self.clock.now += 0.1
        last = self.heard.get(name, (None,))[0]
        before = self.collector.requests(["m"])
        known = self.collector._replicas.get(name)
        same = known is not None and known.demand is not None and known.demand.epoch == str(one.epoch)
        seen = self.collector._totals.get((name, "m"), 0)
        self.collector.told(name, one.document())
        came = self.collector.requests(["m"]) - before
        if same:
            assert came == one.total - seen, "each request is counted once"
        elif one.last_at is not None and last is not None and one.last_at > last:
            assert came == 1, "that there was one is not missed"
        self.heard[name] = self.clock.now, one.held, one.flying

    @precondition(lambda self: self.heard)
    @rule(data=st.data())
    def says_who_waits(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.heard)))
        one = self.routers[name]
        if self.collector._replicas[name].demand.epoch != str(one.epoch):  # type: ignore[union-attr]
            return
        self.collector.holds(name, one.line())
        at, _, flying = self.heard[name]
        self.heard[name] = at, one.held, flying

    @rule(seconds=st.sampled_from([1.0, STALE_S / 2, STALE_S + 1]))
    def passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def sums_are_of_those_that_were_heard(self) -> None:
        fresh = [one for one in self.heard.values() if self.clock.now - one[0] <= STALE_S]
        load = self.collector.load(["m"])
        if not fresh:
            assert load is None, "unknown, and not 0"
            return
        assert load is not None
        assert load.held == sum(held for _, held, _ in fresh)
        assert load.in_flight == sum(flying for _, _, flying in fresh)
        assert load.partial == (len(fresh) < len(self.routers))
        assert load.age_s == pytest.approx(max(self.clock.now - at for at, _, _ in fresh))

    @invariant()
    def what_came_only_grows(self) -> None:
        now = self.collector.requests(["m"])
        assert now >= self.before
        self.before = now


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(max_examples=40, stateful_step_count=30)


def site(*routers: Router, clock: Clock) -> Collector:
    collector = Collector(clock, stale_s=STALE_S, window_s=WINDOW_S)
    collector.expect([str(index) for index in range(len(routers))])
    for index, one in enumerate(routers):
        collector.told(str(index), one.document())
    return collector


def test_a_sample_is_what_the_policy_takes() -> None:
    clock = Clock()
    reading = Reading("http://w", 2.0, 3, 4, 0.5, 100, 0.02)
    one, two = Router(clock, held=2, flying=3, readings=(reading,)), Router(clock, flying=1)
    two.readings = (Reading("http://w", 1.0, 5, 0, 0.6, 10, 0.04),)
    collector = site(one, two, clock=clock)
    sampler = Sampler(collector, ["m"])
    first = sampler.sample(4, 1)
    assert (first.held, first.held_tokens, first.in_flight, first.in_flight_tokens) == (2, 20, 4, 28)
    assert (first.arrivals, first.partial, first.replicas, first.ready) == (None, False, 4, 1)
    assert [(worker.kv_usage, worker.age_s) for worker in first.workers] == [(0.6, 1.0)], "each worker once"
    assert (first.ttft_s, first.itl_s) == (None, 0.04)
    one.total, one.ok, one.counts[1], one.held = 7, 7, 7, 0
    clock.now += 2
    collector.told("0", one.document())
    second = sampler.sample(4, 1)
    assert (second.arrivals, second.held) == (7, 0)
    assert second.ttft_s == pytest.approx(0.48)
    assert second.router_age_s == 2
    clock.now += STALE_S - 1
    assert sampler.sample(4, 1).partial, "the other one was not heard for long"
    clock.now += STALE_S
    last = sampler.sample(4, 1)
    assert (last.held, last.in_flight, last.arrivals, last.router_age_s) == (None, None, None, UNHEARD)


def test_a_router_that_has_not_heard_all_its_processes_makes_sums_partial() -> None:
    clock = Clock()
    load = site(Router(clock, flying=2, complete=False), clock=clock).load(["m"])
    assert load is not None
    assert (load.in_flight, load.partial) == (2, True)


def test_a_model_that_is_new_in_an_epoch_has_all_its_requests_counted() -> None:
    clock = Clock()
    one = Router(clock)
    collector = site(one, clock=clock)
    one.total = one.ok = 3
    collector.told("0", one.document("another"))
    assert collector.requests(["another"]) == 3
    assert collector.outcomes(["another"], "r1").ok == 3
    assert collector.outcomes(["another"], "r2").ok == 0


def test_a_model_that_comes_after_the_router_started_anew_is_counted_from_0() -> None:
    clock = Clock()
    one = Router(clock, total=50)
    collector = site(one, clock=clock)
    one.epoch, one.total = 2, 0
    collector.told("0", Demand("2", True, False, ()))
    one.total = 3
    before = collector.requests(["m"])
    collector.told("0", one.document())
    assert collector.requests(["m"]) - before == 3


def test_a_router_that_is_away_for_a_moment_wakes_nobody_by_requests_of_long_ago() -> None:
    clock = Clock()
    collector = Collector(clock, stale_s=STALE_S, window_s=WINDOW_S)
    collector.expect(["0"])
    clock.now += 100
    one = Router(clock, total=50, last_at=clock.now)
    clock.now += 1
    collector.told("0", one.document())
    clock.now += 3600
    collector.told("0", one.document())
    before = collector.requests(["m"])
    collector.expect([])
    clock.now += 5
    collector.expect(["0"])
    collector.told("0", one.document())
    assert collector.requests(["m"]) == before, "its last request was an hour ago, and was counted then"
    collector.expect([])
    one.total, one.last_at = 51, clock.now + 1
    clock.now += 5
    collector.expect(["0"])
    collector.told("0", one.document())
    assert collector.requests(["m"]) == before + 1


def test_who_asks_for_a_revision_asks_for_the_model() -> None:
    clock = Clock()
    collector = site(Router(clock), clock=clock)
    line = Line("1", True, (Held("m@main", Waiting(1, 10, 0.1, "worker")),))
    clock.now += 1
    noted: list[int] = []
    collector.noted = lambda: noted.append(1)
    assert collector.holds("0", line)
    assert noted
    assert not collector.holds("0", line), "nothing new"
    load = collector.load(["m"])
    assert load is not None
    assert (load.held, load.asleep) == (1, True)
    assert collector.idle_s(["m"]) == 0
    collector.silent("0")
    again = collector.load(["m"])
    assert again is not None
    assert again.held == 0, "as the document says, which is asked for again"


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(1, 5)), max_size=40))
@settings(max_examples=100)
def test_a_window_forgets_what_is_older_and_nothing_else(steps: list[tuple[float, int]]) -> None:
    window, now, added = Window(60), 0.0, Counter[float]()
    for after, requests in steps:
        now += after
        window.add(now, Outcomes(ok=requests))
        added[now] += requests
        kept = window.since(now).ok
        assert sum(n for at, n in added.items() if now - at <= 60 - 5) <= kept
        assert kept <= sum(n for at, n in added.items() if now - at <= 60 + 5)


def test_quantiles() -> None:
    assert quantile(BOUNDS, (0, 0, 0, 0), 0.5) is None
    assert quantile(BOUNDS, (10, 0, 0, 0), 0.5) == pytest.approx(0.05)
    assert quantile(BOUNDS, (0, 10, 0, 0), 1.0) == pytest.approx(0.5)
    assert quantile(BOUNDS, (0, 0, 0, 3), 0.5) == 1.0, "beyond the last bound nothing is known but that"
    assert weighted([], 0.5) is None
    assert weighted([(0.1, 90), (0.9, 10)], 0.9) == 0.1
    assert weighted([(0.1, 90), (0.9, 10)], 0.95) == 0.9
