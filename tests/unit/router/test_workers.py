"""Workers: what the configuration may say, who is a candidate, and counts that come back to zero."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.config import WorkerSettings
from helios.errors import UsageError
from router.scheduling.least_loaded import LeastLoaded
from router.workers import Lease, Worker, Workers, check_url, parse_worker


def workers(*texts: str) -> Workers:
    return Workers([parse_worker(text) for text in texts], lambda: 0.0)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://H:8000/", "http://h:8000"),
        ("https://h/prefix/", "https://h/prefix"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_urls_are_brought_to_one_form(text: str, url: str) -> None:
    assert check_url(text) == url


@pytest.mark.parametrize(
    "text", ["", "h:1", "//h:1", "http://", "http://h:0", "http://h:x", "http://h?x", "http://h#x", "http://u@h"]
)
def test_other_texts_are_no_urls(text: str) -> None:
    with pytest.raises(UsageError):
        check_url(text)


def test_command_line_form_of_a_worker() -> None:
    assert parse_worker("org/m=http://h:1") == WorkerSettings(model="org/m", url="http://h:1", role="both")
    assert parse_worker("m=http://h:1/,role=decode").role == "decode"
    assert parse_worker("m=http://h:1/x=y").url == "http://h:1/x=y"


def test_one_server_of_two_models_is_one_worker() -> None:
    pool = workers("a=http://h:1", "b=http://h:1/", "b=http://h:2")
    assert pool.models == ["a", "b"]
    assert len(pool.all) == 2
    (shared,) = pool.of("a")
    with pool.lease(shared):
        assert LeastLoaded().choose(pool.candidates("b", ())).url == "http://h:2"


def test_candidates_are_up_or_else_unchecked_and_never_prefill() -> None:
    pool = workers("m=http://p:1,role=prefill", "m=http://a:1", "m=http://b:1", "m=http://c:1")
    prefill, a, b, c = pool.of("m")
    assert pool.candidates("m", ()) == [a, b, c]
    prefill.health.succeeded()
    b.health.succeeded()
    assert pool.candidates("m", ()) == [b]
    a.health.failed("x")
    assert pool.candidates("m", {b}) == [c]
    c.health.failed("x")
    assert pool.candidates("m", {b}) == []
    assert pool.candidates("other", ()) == []


def test_a_lease_is_given_back_whatever_happens() -> None:
    pool = workers("m=http://h:1")
    (worker,) = pool.of("m")

    def fail() -> None:
        with pool.lease(worker):
            assert worker.in_flight == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert worker.in_flight == 0


def test_equal_workers_take_turns() -> None:
    pool = workers(*(f"m=http://h:{port}" for port in (1, 2, 3)))
    chosen = []
    for _ in range(9):
        worker = LeastLoaded().choose(pool.candidates("m", ()))
        with pool.lease(worker):
            chosen.append(worker.url[-1])
    assert "".join(chosen) == "123123123"


class LeastLoadedModel(RuleBasedStateMachine):
    """Requests come and go; the chosen worker is never busier than another, and the counts are the leases held."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = workers(*(f"m=http://h:{port}" for port in range(1, 5)))
        self.held: list[tuple[Worker, Lease]] = []

    @rule()
    def request(self) -> None:
        candidates = self.pool.candidates("m", ())
        worker = LeastLoaded().choose(candidates)
        assert worker.in_flight == min(w.in_flight for w in candidates)
        lease = self.pool.lease(worker)
        lease.__enter__()
        self.held.append((worker, lease))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        _, lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        lease.__exit__(None, None, None)

    @invariant()
    def counts_match(self) -> None:
        for worker in self.pool.all:
            assert worker.in_flight == sum(w is worker for w, _ in self.held)


TestLeastLoaded = LeastLoadedModel.TestCase
TestLeastLoaded.settings = settings(max_examples=40, stateful_step_count=30)


@given(st.lists(st.integers(0, 3), max_size=30))
def test_load_differs_by_one_at_most_when_nothing_ends(picks: list[int]) -> None:
    pool = workers("m=http://h:1", "m=http://h:2", "m=http://h:3")
    for _ in picks:
        pool.lease(LeastLoaded().choose(pool.candidates("m", ()))).__enter__()
    loads = [worker.in_flight for worker in pool.all]
    assert max(loads) - min(loads) <= 1
