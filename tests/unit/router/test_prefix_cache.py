"""The default policy: prompts go to who has their beginning, as long as that is the shorter way to the first token."""

from __future__ import annotations

import gc
import json
import random
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.processes.board import Board
from router.processes.sharing import Sharing
from router.relay.fields import read
from router.scheduling.configured import Tools, build
from router.scheduling.homes import Homes, local
from router.scheduling.marks import Marks
from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.request import Request
from router.worker import Lease, Worker
from router.workers import Workers, parse_worker

SYSTEM = "You are an assistant of a company that sells shoes. " * 80
"""Some 1,000 tokens."""


class Site:
    def __init__(
        self, count: int = 4, shared: Sharing | None = None, homes: Homes | None = None, **parameters: Any
    ) -> None:
        """``shared`` and ``homes``: what it has in common with another process."""
        self.now = 1000.0
        load = None if shared is None else shared.load
        workers = [parse_worker(f"m=http://h:{n}") for n in range(1, count + 1)]
        self.workers = Workers(workers, lambda: self.now, load)
        for worker in self.workers.all:
            worker.health.succeeded()
        policy = {"name": "prefix-cache", "slack": 0.0, **parameters}
        table = local if homes is None else lambda _entries: homes
        self.policy = build(policy, Tools(lambda: self.now, random.Random(3), 6.0, homes=table)).policy

    def send(self, *texts: str, streamed: bool = True, **fields: Any) -> tuple[Worker, Lease]:
        """A conversation: the system's text, then a user's and the assistant's in turn."""
        if texts:
            roles = ["system"] + ["user", "assistant"] * len(texts)
            fields["messages"] = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
        body = json.dumps({"model": "m", "stream": streamed, **fields}).encode()
        alone = len(self.workers.of("m")) == 1
        request = Request("m", read(body), path="/v1/chat/completions", body=body, alone=alone)
        worker = self.policy.choose(request, self.workers.candidates("m", ()))
        return worker, self.workers.lease(worker, request.tokens, None, request.prefill, streamed=streamed)

    def ask(self, *texts: str, **fields: Any) -> Worker:
        """``send``, answered at once."""
        worker, lease = self.send(*texts, **fields)
        lease.end()
        return worker


def test_what_begins_alike_goes_where_it_was() -> None:
    site = Site(8)
    first = site.ask(SYSTEM, "question 0")
    assert {site.ask(SYSTEM, f"question {n}") for n in range(1, 20)} == {first}
    others = {site.ask(f"{n} {SYSTEM}", "question") for n in range(100)}
    assert len(others) == 8


def test_a_conversation_goes_on_where_it_is_and_not_where_its_system_prompt_is() -> None:
    site = Site()
    busy, lease = site.send(SYSTEM, "a first question")
    waits = [site.send(f"{n} {SYSTEM * 3}", "long")[0] for n in range(3)]
    assert busy not in waits
    said = [SYSTEM, "another first question " * 100]
    home = site.ask(*said)
    lease.end()
    for turn in range(5):
        said += [f"answer {turn} " * 50, f"question {turn}"]
        assert site.ask(*said) is home


def test_of_a_worker_that_was_down_nothing_is_remembered_when_it_is_up_again() -> None:
    site = Site(2)
    home = site.ask(SYSTEM, "q")
    (other,) = set(site.workers.all) - {home}
    for _ in range(2):
        home.health.failed("gone")
    assert site.ask(SYSTEM, "q") is other
    for _ in range(2):
        home.health.succeeded()
    home.begins_anew()
    assert {site.ask(SYSTEM, f"question {n}") for n in range(20)} == {other}
    while (sent := site.send(SYSTEM, f"{other.in_flight} " + "x" * 2000))[0] is not home:
        assert other.in_flight < 10  # waiting there soon costs more
    assert home.load.prefill > len(SYSTEM) // 4  # all of it has to be computed
    sent[1].end()
    assert site.ask(SYSTEM, "q") is home  # which has it from now on, and nothing waits there


def test_what_the_only_one_got_that_could_serve_is_remembered_unless_the_model_has_no_other() -> None:
    site = Site(2)
    first, second = site.workers.all
    for _ in range(2):
        second.health.failed("gone")
    prompts = [f"{number} {SYSTEM}" for number in range(20)]
    for prompt in prompts:
        assert site.ask(prompt) is first
    for _ in range(2):
        second.health.succeeded()
    assert {site.ask(prompt, "more") for prompt in prompts} == {first}
    one = Site(1, homes=(table := local(1024)))
    one.ask(SYSTEM)
    body = json.dumps({"model": "m", "messages": [{"role": "system", "content": SYSTEM}]}).encode()
    assert not any(table.of(mark) for mark, _ in Marks("m", read(body)).found)  # it would cost time, and be of no use


def test_it_is_computed_elsewhere_once_waiting_costs_more() -> None:
    site = Site(2)
    home = site.ask(SYSTEM, "q")
    (other,) = set(site.workers.all) - {home}
    leases = []
    while (sent := site.send(SYSTEM, "x" * 1000 + str(len(leases))))[0] is home:
        leases.append(sent[1])
    assert sent[0] is other
    # Each question is some 250 tokens and 64 for the request, the system prompt that is spared about 1,000.
    assert 2 <= len(leases) <= 5
    for lease in leases:
        lease.computed()
    sent[1].end()
    assert site.ask(SYSTEM, "x" * 1000 + "again") in (home, other)


def test_prompts_without_anything_in_common_go_where_least_waits() -> None:
    site = Site(4)
    held = [site.send(f"{n} " + "word " * 100 * (n + 1)) for n in range(4)]
    assert len({worker for worker, _ in held}) == 4
    shortest = held[0][0]
    assert site.send("something else")[0] is shortest
    held[3][1].computed()  # the longest one's first byte is here
    assert site.send("and " + "another " * 300)[0] is held[3][0]


def test_what_waits_is_counted_until_the_first_byte_or_the_end() -> None:
    site = Site(1)
    worker, lease = site.send("word " * 1000)
    assert worker.load.prefill > 1000
    lease.computed()
    lease.computed()
    assert worker.load.prefill == 0
    lease.end()
    _, lease = site.send("other " * 1000)
    assert worker.load.prefill > 1000
    lease.end()
    lease.end()
    assert worker.load.prefill == 0
    assert worker.load.requests == 0


def test_an_answer_that_is_no_stream_counts_for_as_long_as_streams_take_there() -> None:
    site = Site(1)
    worker, lease = site.send("word " * 1000, streamed=False)
    site.workers.tick(site.now + 0.9)
    assert worker.load.prefill > 1000
    site.workers.tick(site.now + 1.1)
    assert worker.load.prefill == 0
    lease.end()
    worker.first_byte[1].observe(5.0, site.now)
    _, lease = site.send("more " * 1000, streamed=False)
    site.workers.tick(site.now + 4.0)
    assert worker.load.prefill > 1000
    lease.end()
    site.workers.tick(site.now + 6.0)
    assert worker.load.prefill == 0


def test_no_more_is_remembered_than_is_allowed() -> None:
    site = Site(4, entries=1024)
    for number in range(3000):
        site.ask(f"{number} {SYSTEM}", "q")
        site.now += 1.0

    def spared(number: int) -> bool:
        """Whether the beginning of a prompt is known to be somewhere."""
        _, lease = site.send(f"{number} {SYSTEM}", "another")
        waits = max(worker.load.prefill for worker in site.workers.all)
        lease.end()
        return waits < 500

    assert not any(spared(number) for number in range(0, 1000, 50))
    assert sum(spared(number) for number in range(2950, 3000)) > 30  # sets are not all equally full


def test_two_processes_remember_the_same_and_see_what_waits() -> None:
    """What one has learnt the other knows; the loads are on the board."""
    table, board = local(1 << 14), Board.make(2)
    sites = [Site(8, shared=Sharing(board, board, slot), homes=table) for slot in range(2)]
    for number in range(40):
        one, other = sites if number % 2 else reversed(sites)
        home = one.ask(f"{number} {SYSTEM}", "a question")
        assert other.ask(f"{number} {SYSTEM}", "another question").url == home.url
    busy, lease = sites[0].send("word " * 5000)
    assert {site.ask(f"{n} something else").url == busy.url for site in sites for n in range(30)} == {False}
    lease.end()
    assert [worker.load.prefill for site in sites for worker in site.workers.all] == [0] * 16


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": list(range(100, 500))}, {"prompt": list(range(500, 900))}),
        ({"input": "a" * 3000}, {"input": "b" * 3000}),
        ({"prompt": '"user": "x" ' * 300}, {"prompt": '"user": "y" ' * 300}),
        (
            {"messages": [{"role": "user", "content": "é" * 3000}]},
            {"messages": [{"role": "user", "content": "è" * 3000}]},
        ),
    ],
)
def test_prompts_that_differ_have_no_mark_in_common(one: dict[str, Any], other: dict[str, Any]) -> None:
    found = [Marks("m", read(json.dumps({"model": "m", **fields}).encode())).found for fields in (one, other)]
    assert all(found)
    assert not set(found[0]) & set(found[1])
    assert found[0] == Marks("m", read(json.dumps({"model": "m", "user": "u", **one}).encode())).found
    assert not set(found[0]) & set(Marks("adapter", read(json.dumps({"model": "m", **one}).encode())).found)


TEXTS = st.lists(st.text(max_size=40), min_size=1, max_size=5)


@given(TEXTS, TEXTS, st.integers(0, 5), st.integers(1, 200))
def test_marks_are_those_of_the_messages_that_are_the_same(
    begin: list[str], rest: list[str], shared: int, times: int
) -> None:
    def found(texts: list[str]) -> set[tuple[int, int]]:
        messages = [{"role": "user", "content": text * times} for text in texts]
        return set(Marks("m", read(json.dumps({"model": "m", "messages": messages}).encode())).found)

    whole, other = found(begin), found(begin[:shared] + rest)
    assert found(begin[:shared]) <= whole & other
    if begin[:shared] + rest == begin:
        assert whole == other
    assert found(begin) <= found(begin + rest)


@pytest.mark.parametrize("slack", [0.25, 0.3])
def test_the_owner_of_a_beginning_gets_it_up_to_the_slack_and_no_token_beyond(slack: float) -> None:
    """0.3 is what the policy has by default."""
    request = Request("m", read(b'{"messages": [{"role": "user", "content": "hello"}]}'), path="/v1/chat/completions")
    request.prompt_tokens = 1000
    workers = Site(2).workers.candidates("m", ())
    grade = PrefixCache(local(1024), slack, lambda: 1.0).grade
    owner = grade(request, workers, [0, 0]).index(1.0)
    for behind, best in ((0, owner), (1, owner), (int(1000 * slack), owner), (int(1000 * slack) + 1, 1 - owner)):
        held = [500, 500]
        held[owner] -= behind
        scores = grade(request, workers, held)
        assert scores.index(max(scores)) == best, behind


class Watched(Request):
    """A request that can be seen to be gone."""


@pytest.mark.parametrize("chosen", [True, False])
def test_a_request_and_its_body_are_not_kept_whatever_becomes_of_the_choice(chosen: bool) -> None:
    cache, workers = PrefixCache(local(1024), 0.3, lambda: 1.0), Site(2).workers.candidates("m", ())
    body = json.dumps({"model": "m", "prompt": "hello " * 5000}).encode()
    request = Watched("m", read(body), path="/v1/completions", body=body)
    seen = weakref.ref(request)
    cache.score(request, workers)
    if chosen:
        cache.chosen(request, workers[0])
    del request
    gc.collect()
    assert seen() is None
