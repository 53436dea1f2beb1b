"""A set of workers that changes under way: what sources say, who drains, who comes back, and that nothing is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.config import WorkerSettings
from helios.errors import NotFound
from helios.metrics import RouterMetrics, WorkerState
from router.load import LocalLoad
from router.membership import CONFIGURATION
from router.model_limits import Limits
from router.workers import START, Lease, Worker, Workers, parse_worker


class Watching:
    """Notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def joined(self, worker: Worker) -> None:
        self.heard.append(("joined", worker.url))

    def left(self, worker: Worker) -> None:
        self.heard.append(("left", worker.url))

    def gone(self, worker: Worker) -> None:
        self.heard.append(("gone", worker.url))


class Set:
    """Workers with a clock."""

    def __init__(self, *texts: str, slow_start_s: float = 0.0) -> None:
        self.now = 0.0
        self.workers = Workers([parse_worker(text) for text in texts], lambda: self.now, slow_start_s=slow_start_s)

    def apply(self, source: str, *texts: str) -> list[str]:
        return self.workers.apply(source, [parse_worker(text) for text in texts])

    def urls(self, model: str = "m") -> list[str]:
        return [worker.url[-1] for worker in self.workers.candidates(model, ())]


def test_a_source_replaces_what_it_said_before() -> None:
    scene = Set()
    watching = Watching()
    scene.workers.watch(watching)
    assert scene.apply("file", "m=http://h:1", "m=http://h:2") == []
    kept = scene.workers.of("m")[1]
    scene.apply("file", "m=http://h:2/", "n=http://h:3")
    assert scene.urls() == ["2"]
    assert scene.workers.models == ["m", "n"]
    assert scene.workers.of("m")[0] is kept
    assert watching.heard == [
        ("joined", "http://h:1"), ("joined", "http://h:2"), ("joined", "http://h:3"), ("left", "http://h:1"),
        ("gone", "http://h:1"),
    ]  # fmt: skip


def test_a_removed_worker_drains_and_is_gone_with_its_last_request() -> None:
    scene = Set("m=http://h:1", "m=http://h:2")
    watching = Watching()
    scene.workers.watch(watching)
    first = scene.workers.of("m")[0]
    leases = [scene.workers.lease(first) for _ in range(2)]
    scene.apply(CONFIGURATION, "m=http://h:2")
    assert scene.urls() == ["2"]
    assert list(scene.workers.draining) == [first]
    leases[0].end()
    assert watching.heard[2:] == [("left", "http://h:1")]
    leases[1].end()
    leases[1].end()
    assert watching.heard[2:] == [("left", "http://h:1"), ("gone", "http://h:1")]
    assert not scene.workers.draining


def test_a_worker_that_comes_back_while_it_drains_is_the_same_worker() -> None:
    scene = Set("m=http://h:1")
    watching = Watching()
    (worker,) = scene.workers.of("m")
    worker.health.succeeded()
    scene.workers.watch(watching)
    lease = scene.workers.lease(worker, 100)
    scene.apply(CONFIGURATION)
    assert scene.urls() == []
    scene.apply(CONFIGURATION, "m=http://h:1")
    assert scene.workers.of("m") == [worker]
    assert worker.up
    lease.end()
    assert watching.heard == [("joined", worker.url), ("left", worker.url), ("joined", worker.url)]
    assert (worker.load.requests, worker.load.tokens) == (0, 0)


def test_a_worker_that_was_gone_comes_back_as_a_new_one() -> None:
    scene = Set("m=http://h:1", "m=http://h:2")
    first = scene.workers.of("m")[0]
    scene.apply(CONFIGURATION, "m=http://h:2")
    scene.apply(CONFIGURATION, "m=http://h:2", "m=http://h:1")
    assert scene.workers.of("m")[1] is not first


def test_two_sources_name_one_worker() -> None:
    scene = Set("a=http://h:1")
    assert scene.apply("kubernetes", "a=http://h:1/", "b=http://h:1") == []
    assert len(scene.workers.all) == 1
    assert scene.workers.models == ["a", "b"]
    scene.apply(CONFIGURATION)
    assert scene.workers.models == ["a", "b"]
    scene.apply("kubernetes", "b=http://h:1")
    assert scene.workers.models == ["b"]
    scene.apply("kubernetes")
    assert not scene.workers.all


@pytest.mark.parametrize("order", [("registration", "file"), ("file", "registration")])
def test_where_two_contradict_each_other_one_counts_whoever_came_first(order: tuple[str, str]) -> None:
    said = {"file": "m=http://h:1,revision=r1", "registration": "other=http://h:1,revision=r2"}
    scene = Set()
    for source in order:
        scene.apply(source, said[source])
    (worker,) = scene.workers.all
    assert (worker.revision, worker.models) == ("r1", ["m"])
    assert scene.workers.problems == {
        "registration": ["http://h:1: file counts, since registration and it name two revisions: r1 and r2"]
    }
    scene.apply("file")
    assert (worker.revision, worker.models) == ("r2", ["other"])
    assert scene.workers.problems == {}


def test_of_several_limits_of_a_model_the_least_counts() -> None:
    workers = Workers((), lambda: 0.0)
    ones = [
        WorkerSettings(model="m", url="http://h:1", max_in_flight=8),
        WorkerSettings(model="m", url="http://h:2", max_in_flight=5, max_queued=3),
        WorkerSettings(model="n", url="http://h:3"),
    ]
    workers.apply("kubernetes", ones)
    assert workers.limits("m") == Limits(5, 3)
    assert (workers.spare("m"), workers.may_wait("m")) == (5, 3)
    leases = [workers.lease(worker) for worker in workers.of("m")]
    assert workers.spare("m") == 3
    assert (workers.spare("n"), workers.may_wait("n")) == (math.inf, math.inf)
    workers.apply("registration", [WorkerSettings(model="m", url="http://h:1")])
    assert workers.limits("m") == Limits(5, 3), "who says none takes none back"
    workers.apply("kubernetes", [ones[0]])
    assert workers.spare("m") == 6, "what a worker that leaves still has counts"
    for lease in leases:
        lease.end()
    assert workers.spare("m") == 8


def test_one_wrong_entry_is_said_and_the_others_count() -> None:
    scene = Set()
    entries = [
        WorkerSettings(model="m", url="ftp://h"),
        WorkerSettings(model="m", url="http://käse..x:1"),
        WorkerSettings(model="m", url="http://h:1", weight=0),
        WorkerSettings(model="", url="http://h:1"),
        WorkerSettings(model="m", url="http://h:2"),
        WorkerSettings(model="m", url="http://h:2"),
        WorkerSettings(model="n", url="http://h:2", role="decode"),
    ]
    problems = scene.workers.apply("file", entries)
    assert scene.urls() == ["2"]
    assert len(problems) == 6
    assert scene.workers.apply("file", list(entries)) == problems
    assert scene.workers.apply("file", entries[4:5]) == []


def test_what_changes_of_a_worker_counts_at_once() -> None:
    scene = Set("m=http://h:1", "m=http://h:2")
    first = scene.workers.of("m")[0]
    scene.apply(CONFIGURATION, "m=http://h:1,role=prefill,weight=3", "m=http://h:2")
    assert scene.urls() == ["2"]
    assert (first.role, first.weight, first.share) == ("prefill", 3.0, 3.0)
    assert scene.workers.without_decode() == []
    scene.apply(CONFIGURATION, "m=http://h:1,role=prefill")
    assert scene.workers.without_decode() == ["m"]


def test_a_model_without_workers_is_known_for_a_while() -> None:
    scene = Set("m=http://h:1")
    scene.apply(CONFIGURATION)
    assert scene.workers.known("m")
    assert scene.workers.why_none("m") == "it has none now"
    scene.now = 3600.0
    assert not scene.workers.known("m")
    assert not scene.workers.known("other")


def test_an_adapter_is_asked_for_by_its_name_where_it_is() -> None:
    scene = Set("m=http://h:1,adapter=poems", "m=http://h:2")
    assert (scene.urls("poems"), scene.urls("m")) == (["1"], ["1", "2"])
    assert (scene.workers.adapter("poems"), scene.workers.adapter("m")) == ("poems", None)
    scene.apply(CONFIGURATION, "m=http://h:1", "m=http://h:2")
    assert scene.workers.adapter("poems") is None
    assert scene.workers.models == ["m"]


def test_a_cordoned_worker_gets_nothing_new_until_it_is_uncordoned() -> None:
    scene = Set("m=http://h:1", "m=http://h:2")
    lease = scene.workers.lease(scene.workers.of("m")[0])
    scene.workers.cordon("http://H:1/")
    assert scene.urls() == ["2"]
    scene.workers.cordon("http://h:2")
    assert scene.urls() == []
    assert scene.workers.why_none("m") == "cordoned by an administrator"
    scene.apply(CONFIGURATION, "m=http://h:2")
    scene.apply(CONFIGURATION, "m=http://h:1", "m=http://h:2")
    assert scene.urls() == []
    scene.workers.uncordon("http://h:1")
    assert scene.urls() == ["1"]
    lease.end()
    with pytest.raises(NotFound, match="http://h:3"):
        scene.workers.cordon("http://h:3")


def test_a_worker_that_comes_up_gets_its_share_over_a_time() -> None:
    scene = Set("m=http://h:1,weight=2", slow_start_s=10.0)
    (old,) = scene.workers.all
    scene.workers.came_up(old, was_down=False)
    assert old.share == 2.0  # it was there from the beginning
    scene.apply(CONFIGURATION, "m=http://h:1,weight=2", "m=http://h:2,weight=2")
    new = scene.workers.of("m")[1]
    scene.workers.came_up(new, was_down=False)
    shares = []
    for scene.now in (0.0, 0.5, 5.0, 10.0, 99.0):
        scene.workers.tick(scene.now)
        shares.append(new.share)
    assert shares == [2 * START, 2 * START, 1.0, 2.0, 2.0]
    scene.workers.came_up(old, was_down=True)
    assert old.share == 2 * START
    scene.workers.tick(scene.now + 5)
    assert old.share == 1.0


def test_the_gauges_are_those_of_the_workers_there_are() -> None:
    scene = Set("m=http://h:1", "m=http://h:2")

    def measured() -> list[WorkerState]:
        there = [WorkerState(w.url, w.models, w.up, w.load.requests, w.load.tokens) for w in scene.workers.all]
        return there + [WorkerState(w.url, (), w.up, w.load.requests, w.load.tokens) for w in scene.workers.draining]

    metrics = RouterMetrics(measured)
    lease = scene.workers.lease(scene.workers.of("m")[0], 50)
    scene.apply(CONFIGURATION, "m=http://h:2")
    text = metrics.render().decode()
    assert 'helios_router_in_flight{worker="http://h:1"} 1.0' in text
    assert 'helios_router_in_flight_tokens{worker="http://h:1"} 50.0' in text
    assert 'worker_up{model="m",worker="http://h:1"}' not in text
    assert 'worker_up{model="m",worker="http://h:2"} 0.0' in text
    lease.end()
    assert "http://h:1" not in metrics.render().decode()


SOURCES = (CONFIGURATION, "file", "kubernetes")
COMMIT = "c" * 40
PINNED = f"a@{COMMIT}"
SETTINGS = st.builds(
    WorkerSettings,
    model=st.sampled_from(["a", "b", PINNED]),
    revision=st.sampled_from(["", "r1", COMMIT]),
    url=st.sampled_from(["http://h:1", "http://h:1/", "http://h:2", "http://h:3", "nonsense"]),
    role=st.sampled_from(["both", "decode", "prefill"]),
    adapters=st.sampled_from([[], ["x"]]),
)


class SetModel(RuleBasedStateMachine):
    """Sources say anything in any order while requests come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[LocalLoad] = []
        self.workers = Workers((), lambda: 0.0, self.load, pins=True)
        self.watching = Watching()
        self.workers.watch(self.watching)
        self.held: list[tuple[Worker, Lease]] = []
        self.said: dict[str, Sequence[WorkerSettings]] = {}

    def load(self, url: str) -> LocalLoad:
        self.loads.append(LocalLoad())
        return self.loads[-1]

    @rule(source=st.sampled_from(SOURCES), said=st.lists(SETTINGS, max_size=4))
    def source_says(self, source: str, said: list[WorkerSettings]) -> None:
        self.workers.apply(source, said)
        self.said[source] = said

    @rule(model=st.sampled_from(["a", "b", "x", PINNED]), data=st.data(), tokens=st.integers(0, 9))
    def request_comes(self, model: str, data: st.DataObject, tokens: int) -> None:
        candidates = self.workers.candidates(model, ())
        assert all(worker.role != "prefill" and not worker.cordoned for worker in candidates)
        if candidates:
            worker = data.draw(st.sampled_from(candidates))
            self.held.append((worker, self.workers.lease(worker, tokens, self.workers.adapter(model))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def request_ends(self, data: Any) -> None:
        _, lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        lease.end()

    @precondition(lambda self: self.workers.all)
    @rule(data=st.data(), cordoned=st.booleans())
    def administrator_acts(self, data: Any, cordoned: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers.all, key=lambda one: one.url)))
        (self.workers.cordon if cordoned else self.workers.uncordon)(worker.url)

    @invariant()
    def the_set_is_what_sources_say(self) -> None:
        named = {one.url.rstrip("/") for said in self.said.values() for one in said} - {"nonsense"}
        assert {worker.url for worker in self.workers.all} == named
        for model in ("a", "b", "x"):
            assert len(self.workers.of(model)) == len(set(self.workers.of(model)))
            assert all(model in worker.names for worker in self.workers.of(model))
        for worker in self.workers.all:
            assert all(worker in self.workers.of(name) for name in worker.names | worker.pinned)

    @invariant()
    def a_commit_of_a_model_is_what_its_workers_run(self) -> None:
        pinned = self.workers.of(PINNED)
        assert all(PINNED in one.models or ("a" in one.models and one.revision == COMMIT) for one in pinned)
        assert (PINNED in self.workers.models) is any(PINNED in one.models for one in pinned)
        assert self.workers.own_name(PINNED) == ("a" if pinned and PINNED not in self.workers.models else PINNED)

    @invariant()
    def only_those_with_requests_drain(self) -> None:
        busy = {worker for worker, _ in self.held}
        assert set(self.workers.draining) == busy - set(self.workers.all)
        assert sum(load.requests for load in self.loads) == len(self.held)
        assert all(worker.leases == sum(one is worker for one, _ in self.held) for worker in busy)

    @invariant()
    def each_that_joined_left_before_it_was_gone(self) -> None:
        state: dict[str, str] = {}
        allowed = {"joined": ("", "left", "gone"), "left": ("joined",), "gone": ("left",)}
        for event, url in self.watching.heard:
            assert state.get(url, "") in allowed[event]
            state[url] = event

    def teardown(self) -> None:
        for _, lease in self.held:
            lease.end()
        for source in SOURCES:
            assert self.workers.apply(source, ()) == []
        assert not self.workers.all
        assert not self.workers.draining
        assert not self.workers.models
        assert not self.workers.problems
        assert all((load.requests, load.tokens) == (0, 0) for load in self.loads)


TestSet = SetModel.TestCase
TestSet.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
