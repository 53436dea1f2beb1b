"""Late requests under a real router: the second worker's answer, and what the first one sees of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import Response, RouterProcess, StartRouter, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
EMBEDDINGS = "/v1/embeddings"
LONG_S = 60.0
"""Longer than any test waits: who gets an answer did not wait for this worker."""


def hedging(after_s: float = 0.2, floor_per_s: float = 10, **more: Any) -> str:
    """The settings."""
    return json.dumps({"models": {"tiny": {"after_s": after_s}}, "budget_floor_per_s": floor_per_s, **more})


@pytest.fixture
def start(start_router: StartRouter) -> StartRouter:
    """Starts a router whose first request goes to the first worker."""
    return partial(start_router, args=("--policy", "least-requests"))


def slow(fake: Control, seconds: float = LONG_S, times: int | None = None) -> None:
    fake.fault("slow", delay_s=seconds, times=times)


def embed(router: RouterProcess) -> Response:
    return router.request("POST", EMBEDDINGS, {"model": "tiny", "input": "hello"}, {"x-request-id": "mine"})


def hedges(router: RouterProcess, result: str) -> float:
    return router.metric("helios_router_hedges_total", model="tiny", result=result)


def test_a_fast_worker_answers_for_a_slow_one_which_sees_its_client_leave(
    fake_vllm: Start, start: StartRouter, wait_for: Any
) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    slow(one)
    router = start(one, two, hedging=hedging())
    answer = embed(router)
    assert (answer.status, answer.json()["object"]) == (200, "list")
    (first,), (second,) = one.journal(), two.journal()
    assert first["body_sha256"] == second["body_sha256"]
    wait_for(lambda: one.journal()[0]["outcome"] == "disconnected", what="the slow worker to see it")
    assert second["outcome"] == "finished"
    assert hedges(router, "won") == 1
    assert router.metric("helios_router_breaker_state") == 0
    assert (router.in_flight(), router.metric("helios_router_retries_total")) == (0, 0)
    assert router.metric("helios_router_requests_total", route=EMBEDDINGS) == 1
    sent = [dict(record["headers"]) for record in (first, second)]
    assert [one["x-request-id"] for one in sent] == ["mine", "mine"]
    (line,) = [
        line for line in router.messages() if line["message"] == "a late request goes to a second worker as well"
    ]
    assert (line["worker"], line["to"], line["request_id"]) == (one.url, two.url, "mine")
    spans = [headers["traceparent"][36:52] for headers in sent]
    assert [line["span_id"], line["to_span_id"]] == spans
    assert {headers["traceparent"][3:35] for headers in sent} == {line["trace_id"]}


def test_when_both_are_slow_one_answers_and_the_other_is_left(
    fake_vllm: Start, start: StartRouter, wait_for: Any
) -> None:
    fakes = [fake_vllm("tiny"), fake_vllm("tiny")]
    for fake in fakes:
        slow(fake, 1.5)
    router = start(*fakes, hedging=hedging())
    assert embed(router).status == 200
    outcomes = ["disconnected", "finished"]
    wait_for(lambda: sorted(fake.journal()[0]["outcome"] for fake in fakes) == outcomes, what="one to be left")
    assert hedges(router, "won") + hedges(router, "lost") == 1
    assert router.in_flight() == 0


def test_the_second_attempt_goes_on_when_the_first_worker_dies(
    fake_vllm: Start, start: StartRouter, wait_for: Any
) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    slow(one)
    slow(two, 1.5)
    router = start(one, two, hedging=hedging())
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(embed(router).status))
    asking.start()
    wait_for(lambda: len(two.journal()) == 1, what="the second attempt")
    one.refuse()
    asking.join(20)
    assert answers == [200]
    assert len(two.journal()) == 1  # nobody asked a third time
    assert router.metric("helios_router_retries_total") == 0
    assert router.in_flight() == 0


def test_a_client_that_leaves_while_both_run_leaves_nothing(
    fake_vllm: Start, start: StartRouter, wait_for: Any
) -> None:
    fakes = [fake_vllm("tiny"), fake_vllm("tiny")]
    for fake in fakes:
        slow(fake)
    router = start(*fakes, hedging=hedging())
    connection = router.connection()
    connection.request(
        "POST", EMBEDDINGS, json.dumps({"model": "tiny", "input": "x"}), {"content-type": "application/json"}
    )
    wait_for(lambda: router.in_flight() == 2, what="both attempts")
    connection.close()
    wait_for(lambda: router.in_flight() == 0, what="nothing to be under way")
    outcomes = ["disconnected", "disconnected"]
    wait_for(lambda: [fake.journal()[0]["outcome"] for fake in fakes] == outcomes, what="both workers to see it")
    assert hedges(router, "gone") == 1
    assert router.metric("helios_router_client_disconnects_total") == 1


def test_the_budget_bounds_second_attempts_and_busy_workers_get_none(fake_vllm: Start, start: StartRouter) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    slow(one, 0.6)
    slow(two, 0.6)
    router = start(one, two, hedging=hedging(floor_per_s=0.1, budget_ratio=0))
    assert [embed(router).status for _ in range(2)] == [200, 200]
    assert len(one.journal()) + len(two.journal()) == 3
    assert router.metric("helios_router_unhedged_total", model="tiny", reason="budget") == 1
    router.stop()

    queue = {"queue": {"per_worker": 1}}
    router = start(one, two, hedging=hedging(), admission=json.dumps(queue))
    asking = [threading.Thread(target=embed, args=(router,)) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(20)
    assert len(one.journal()) + len(two.journal()) >= 7
    assert router.metric("helios_router_unhedged_total", model="tiny", reason="busy") >= 2
    assert router.in_flight() == 0


def test_a_stream_is_answered_by_whoever_has_the_first_token_and_counted_once(
    fake_vllm: Start, start: StartRouter, wait_for: Any
) -> None:
    """Both send the head at once, as vLLM does: that decides nothing."""
    one, two = fake_vllm("tiny", prefill_s=LONG_S), fake_vllm("tiny", token_s=0.01)
    admission = {"models": {"tiny": {"tokens_per_minute": 100_000}}}
    router = start(
        one, two, hedging=hedging(), retries=json.dumps({"retry_generation": True}), admission=json.dumps(admission)
    )
    body = {
        "model": "tiny", "max_tokens": 6, "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hello"}],
    }  # fmt: skip
    sock, answer = stream(router.address, "/v1/chat/completions", body)
    text = answer.read().decode()
    sock.close()
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert len({event["id"] for event in events}) == 1
    assert text.endswith("data: [DONE]\n\n")
    (usage,) = [event["usage"]["total_tokens"] for event in events if event.get("usage")]
    assert router.metric("helios_router_tokens_total", model="tiny") == usage
    wait_for(lambda: one.journal()[0]["outcome"] == "disconnected", what="the slow worker to see it")
    assert (hedges(router, "won"), router.in_flight()) == (1, 0)


def test_generation_is_not_sent_twice_unless_that_is_wanted(fake_vllm: Start, start: StartRouter) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    slow(one, 0.6, times=1)
    router = start(one, two, hedging=hedging())
    assert router.chat().status == 200
    assert (len(one.journal()), len(two.journal())) == (1, 0)


def test_settings_that_can_not_work_end_the_start(helios: Any) -> None:
    for settings, message in (
        ({"models": {"m": {"percentile": 120}}}, "router.hedging.models.'m'.percentile must be at least 50"),
        ({"models": {"m": {"after": 1}}}, "unknown field"),
    ):
        environ = {"HELIOS_ROUTER__HEDGING": json.dumps(settings)}
        result = helios("router", "--port", "0", "--worker", "m=http://127.0.0.1:1", env=environ, code=2)
        assert message in result.err
