"""What processes say of the demand, and the control process's sums of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.config import RouterSettings
from helios.demand import Demand, Reading, encode, read
from helios.metrics import LATENCY_S, RouterMetrics
from router.admission.queue import Claim, Ticket
from router.demand.book import SILENT_S, Book
from router.demand.counts import Ended, ModelCounts, Queued
from router.demand.sayer import COUNT_S, Sayer
from router.demand.shown import Shown
from router.health import State
from router.relay import accounts
from router.relay.accounts import Accounts
from router.resilience.resilience import Resilience
from router.worker_metrics import parse
from router.workers import Workers, parse_worker

PROCESSES = 3
MODELS = st.sampled_from(["a", "b", "c"])


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Sums(RuleBasedStateMachine):
    """Processes that count, wait, end and are replaced: the book is always their sum, and says when it is not all."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.book = Book(PROCESSES, self.clock)
        self.living: dict[int, dict[str, tuple[int, int]]] = {}
        self.ever: Counter[str] = Counter()
        self.number = 0
        self.heard: dict[int, float] = {}

    @precondition(lambda self: len(self.living) < PROCESSES)
    @rule()
    def starts(self) -> None:
        self.number += 1
        self.living[self.number] = {}

    @precondition(lambda self: self.living)
    @rule(data=st.data(), model=MODELS, more=st.integers(0, 3), waiting=st.integers(0, 4))
    def says(self, data: st.DataObject, model: str, more: int, waiting: int) -> None:
        member = data.draw(st.sampled_from(sorted(self.living)))
        requests = self.living[member].get(model, (0, 0))[0] + more
        self.living[member][model] = requests, waiting
        self.ever[model] += more
        queued = Queued(waiting, waiting * 10, self.clock.now - waiting, waking=True) if waiting else None
        ended = [Ended("r1", requests, 0, 0, 0, [requests] + [0] * len(LATENCY_S), 0.0)]
        version = self.book.pulse.version
        self.book.counted(member, [ModelCounts(model, requests, self.clock.now, queued, ended)])
        self.heard[member] = self.clock.now
        assert self.book.pulse.version > version or not waiting, "whoever watches hears of all who wait"

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(sorted(self.living)))
        del self.living[member]
        self.heard.pop(member, None)
        self.book.gone(member)

    @rule(seconds=st.sampled_from([0.5, SILENT_S]))
    def passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def it_is_the_sum(self) -> None:
        sums = self.book.sums()
        assert {model: one.requests for model, one in sums.items() if one.requests} == +self.ever
        for model, one in sums.items():
            assert sum(ended.ok for ended in one.ended.values()) == self.ever[model]
        waiting = Counter[str]()
        for said in self.living.values():
            for model, (_, requests) in said.items():
                waiting[model] += requests
        assert {held.model: held.waiting.requests for held in self.book.line().held} == +waiting

    @invariant()
    def it_says_when_that_is_not_all(self) -> None:
        lately = sum(self.clock.now - at < SILENT_S for at in self.heard.values())
        assert self.book.complete == (lately == PROCESSES)


TestSums = Sums.TestCase
TestSums.settings = settings(max_examples=40, stateful_step_count=30)


class Site:
    """A process's relay, as far as the sayer looks at it: real accounts, budgets and workers."""

    def __init__(self) -> None:
        self.clock, self.metrics = Clock(), RouterMetrics()
        self.said: list[list[ModelCounts]] = []
        self.workers = Workers([parse_worker("m=http://w:1")], self.clock)
        self.waiting: dict[str, list[Ticket]] = {}
        line = SimpleNamespace(
            models=lambda: [model for model, found in self.waiting.items() if found],
            tickets=lambda model: self.waiting.get(model, []),
        )
        settings = RouterSettings()
        relay: Any = SimpleNamespace(
            accounts=Accounts(self.metrics), resilience=Resilience(settings, self.metrics, self.clock),
            workers=self.workers, admission=SimpleNamespace(line=line, begins_to_wait=None),
        )  # fmt: skip
        self.relay = relay
        self.sayer = Sayer(relay, self.said.append, self.clock)

    def wait(self, model: str, cost: float) -> None:
        owner: Any = None
        self.waiting.setdefault(model, []).append(Ticket(owner, Claim("t", 0, 1.0, cost, 1), self.clock.now))
        self.relay.admission.begins_to_wait(model)

    def ended(self, status: int, revision: str, *, streamed: bool = False, cut: bool = False) -> None:
        key = "/v1/chat/completions", "m", status, revision, streamed, cut
        account = self.relay.accounts.of(key) or self.relay.accounts.made(key, set())
        account.count.inc()
        account.first_byte.observe(0.2)

    def passes(self, seconds: float) -> list[ModelCounts]:
        self.clock.now += seconds
        self.said.clear()
        self.sayer.tick()
        return [one for message in self.said for one in message]


def test_the_first_that_waits_is_told_of_at_once_and_the_others_by_the_timer() -> None:
    async def run() -> None:
        site = Site()
        (worker,) = site.workers.all
        worker.health.judged(State.DOWN, "asleep")
        site.wait("m", 40)
        site.wait("m", 2)
        await asyncio.sleep(0)
        assert site.said == [[ModelCounts("m", 0, 0.0, Queued(2, 42, 1000.0, waking=True), [])]]
        site.said.clear()
        site.wait("m", 8)
        await asyncio.sleep(0)
        assert site.said == []
        worker.health.judged(State.UP, "")
        assert site.passes(0.1) == [ModelCounts("m", 0, 0.0, Queued(3, 50, 1000.0, waking=False), [])]
        assert site.passes(0.1) == []
        site.waiting.clear()
        assert site.passes(0.1) == [ModelCounts("m", 0, 0.0, None, [])]

    asyncio.run(run())


def test_requests_are_counted_by_what_became_of_them_and_by_revision() -> None:
    site = Site()
    site.relay.resilience.began("m")
    site.ended(200, "r1", streamed=True)
    site.ended(200, "r1")
    site.ended(200, "r2", streamed=True, cut=True)
    site.ended(503, "")
    site.ended(429, "")
    site.relay.accounts.elsewhere["m", "r2"] += 2
    (told,) = site.passes(COUNT_S)
    assert (told.requests, told.last_at) == (1, 1000.0)
    assert {one.revision: (one.ok, one.failed, one.refused, one.elsewhere, sum(one.times)) for one in told.ended} == {
        "r1": (2, 0, 0, 0, 1), "r2": (0, 1, 0, 2, 1), "": (0, 1, 1, 0, 0),
    }  # fmt: skip
    assert site.passes(COUNT_S) == []
    assert site.said == [[]], "that it lives is said all the same"
    site.sayer.anew()
    assert site.said[-1] == [told], "a new control process is told everything"


def test_what_revisions_that_are_gone_had_is_put_together(monkeypatch: Any) -> None:
    monkeypatch.setattr(accounts, "MOST", 8)
    site = Site()
    site.relay.accounts._fold_at = 8
    for number in range(8):
        site.ended(200, f"r{number}")
    key = "/v1/chat/completions", "m", 200, "new", False, False
    site.relay.accounts.made(key, {"r7"}).count.inc()
    (told,) = site.passes(COUNT_S)
    assert {one.revision: one.ok for one in told.ended} == {"": 7, "r7": 1, "new": 1}
    labels = {"route": "/v1/chat/completions", "model": "m", "status": "200"}
    assert site.metrics.registry.get_sample_value("helios_router_requests_total", labels) == 9
    assert site.metrics.registry.get_sample_value("helios_router_first_byte_seconds_count", {"model": "m"}) == 8


def test_the_document_says_what_workers_do_and_null_for_what_nobody_knows() -> None:
    clock = Clock()
    book, draining = Book(1, clock), False
    specs = ["m=http://a:1,role=prefill,revision=r1", "m=http://b:1,role=decode,revision=r1", "m=http://c:1"]
    workers = Workers([parse_worker(one) for one in specs], clock)
    shown = Shown(book, workers, 6.0, clock, lambda: draining)
    found = read(encode(shown.document()))
    assert isinstance(found, Demand)
    assert not found.complete
    assert shown.wanted
    (model,) = found.models
    assert [(one.role, one.revision, one.workers, one.ready, one.readings) for one in model.roles] == [
        ("both", "", 1, 0, ()), ("decode", "r1", 1, 0, ()), ("prefill", "r1", 1, 0, ()),
    ]  # fmt: skip
    assert (model.idle_s, model.waiting, model.requests_total) == (None, None, 0)
    first, second, _ = workers.all
    for worker in (first, second):
        worker.health.judged(State.UP, "")
    second.load.begin(70)
    text = b"vllm:num_requests_running 2\nvllm:num_requests_waiting 5\nvllm:kv_cache_usage_perc 0.25\n"
    text += b"vllm:inter_token_latency_seconds_sum %f\nvllm:inter_token_latency_seconds_count %d\n"
    for seconds, number in ((1.0, 10), (2.5, 20)):
        reading = parse(text % (seconds, number), clock.now, 0)
        assert reading is not None
        second.metrics = reading.since(second.metrics)
    book.counted(1, [ModelCounts("m", 9, clock.now - 4, None, [])])
    clock.now += 2
    (model,) = shown.document().models
    decode = model.roles[1]
    assert (decode.ready, decode.in_flight, decode.tokens) == (1, 1, 70)
    assert decode.readings == (Reading(second.url, 2.0, 2, 5, 0.25, 10, 0.15),)
    assert (model.roles[2].ready, model.roles[2].readings) == (1, ())
    assert (model.idle_s, model.requests_total) == (6.0, 9)
    clock.now += 60
    assert not shown.wanted, "nobody has looked for a minute"
    assert shown.document().models[0].roles[1].readings == (), "what was read a minute ago is not known now"
