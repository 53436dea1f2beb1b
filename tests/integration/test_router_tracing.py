"""Spans of a real router at a collector: what they say, whose children they are, and a collector that is away."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.otlp import Collector, Span, collector
from tests.support.routing import RouterProcess, StartRouter, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
def found() -> Iterator[Collector]:
    with collector() as one:
        yield one


def tracing(collector: Collector, **more: Any) -> str:
    return json.dumps({"endpoint": collector.url, "interval_s": 0.1, "timeout_s": 1.0, **more})


def caller(flags: str = "01") -> tuple[str, str, dict[str, str]]:
    """Trace and span of a client, and the header that says them."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, {"traceparent": f"00-{trace}-{span}-{flags}"}


def worker_parent(fake: Control) -> list[str]:
    """The ``traceparent`` of the last request that a worker got, in its parts."""
    return str(dict(fake.journal(CHAT)[-1]["headers"])["traceparent"]).split("-")


def of_trace(found: Collector, wait_for: Any, trace: str, count: int) -> list[Span]:
    """A trace's spans, the server's first."""
    wait_for(lambda: sum(span.trace == trace for span in found.spans) >= count, what="the spans to come")
    return sorted((s for s in found.spans if s.trace == trace), key=lambda s: (s.kind != "server", s.began))


def test_a_request_and_each_time_it_was_sent_have_spans(
    fake_vllm: Callable[..., Control], start_router: StartRouter, found: Collector, wait_for: Any
) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    router = start_router(one, two, tracing=tracing(found), policy="round-robin")
    # A stream.
    trace, span, headers = caller()
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    answer = router.request("POST", CHAT, {**BODY, **options}, headers)
    assert answer.status == 200
    server, client = of_trace(found, wait_for, trace, 2)
    assert (server.kind, server.name, server.parent) == ("server", f"POST {CHAT}", span)
    assert (client.kind, client.name, client.parent) == ("client", "chat tiny", server.id)
    fake = one if one.journal(CHAT) else two
    assert worker_parent(fake)[1:] == [trace, client.id, "01"]
    assert server.began <= client.began <= client.ended <= server.ended
    assert abs(server.ended - time.time_ns()) < 60e9
    said = server.attributes
    assert (said["http.request.method"], said["http.route"], said["http.response.status_code"]) == ("POST", CHAT, 200)
    assert (said["helios.request.id"], said["helios.attempts"]) == (answer.header("x-request-id"), 1)
    assert 0 <= said["helios.queue_wait"] <= said["helios.time_to_first_byte"]
    assert client.attributes["url.full"] == fake.url + CHAT
    assert client.attributes["gen_ai.provider.name"] == "vllm"
    assert client.attributes["gen_ai.response.time_to_first_chunk"] >= 0
    for attributes in (server.attributes, client.attributes):
        assert (attributes["gen_ai.operation.name"], attributes["gen_ai.request.model"]) == ("chat", "tiny")
        assert (attributes["gen_ai.usage.output_tokens"], attributes["gen_ai.request.stream"]) == (4, True)
        assert attributes["gen_ai.usage.input_tokens"] > 0
        assert "error.type" not in attributes
    assert not server.failed
    assert server.resource["service.name"] == "helios-router"
    # One that is sent again.
    for each in (one, two):
        each.fault("status", status=503, times=1)
    trace, _, headers = caller()
    assert router.request("POST", CHAT, BODY, headers).status == 503
    server, first, second = of_trace(found, wait_for, trace, 3)
    assert (server.failed, server.attributes["error.type"], server.attributes["helios.attempts"]) == (True, "503", 2)
    assert first.id != second.id
    assert {first.attributes["url.full"], second.attributes["url.full"]} == {each.url + CHAT for each in (one, two)}
    assert (first.failed, second.failed, second.attributes["http.request.resend_count"]) == (True, True, 1)
    assert (first.attributes["error.type"], second.attributes["error.type"]) == ("503", "503")
    assert {worker_parent(each)[2] for each in (one, two)} == {first.id, second.id}
    # One that no worker gets.
    trace, span, headers = caller()
    assert router.request("POST", CHAT, {**BODY, "model": "nope"}, headers).status == 404
    (server,) = of_trace(found, wait_for, trace, 1)
    assert (server.failed, server.parent, server.attributes["http.response.status_code"]) == (False, span, 404)
    # What a client does not want recorded is not, and its worker is told so.
    trace, _, headers = caller("00")
    assert router.request("POST", CHAT, BODY, headers).status == 200
    last = next(each for each in (one, two) if worker_parent(each)[1] == trace)
    assert worker_parent(last)[3] == "00"
    router.stop()
    assert trace not in {span.trace for span in found.spans}


def test_the_two_attempts_of_a_hedged_request_have_spans_of_their_own(
    fake_vllm: Callable[..., Control], start_router: StartRouter, found: Collector, wait_for: Any
) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    one.fault("slow", delay_s=60.0)
    hedging = json.dumps({"models": {"tiny": {"after_s": 0.2}}, "budget_floor_per_s": 10})
    router = start_router(one, two, tracing=tracing(found), hedging=hedging, policy="least-requests")
    trace, span, headers = caller()
    asked = {"model": "tiny", "input": "hello"}
    assert router.request("POST", "/v1/embeddings", asked, headers).status == 200
    server, first, second = of_trace(found, wait_for, trace, 3)
    assert (server.parent, server.failed, server.attributes["helios.attempts"]) == (span, False, 2)
    assert (first.parent, second.parent) == (server.id, server.id)
    parents = [dict(each.journal()[-1]["headers"])["traceparent"].split("-") for each in (one, two)]
    assert [parent[1:] for parent in parents] == [[trace, first.id, "01"], [trace, second.id, "01"]]
    assert first.began + 0.19e9 < second.began < second.ended <= server.ended  # the loop counts milliseconds
    assert second.began < first.ended <= server.ended
    assert (first.failed, first.attributes["helios.overtaken"]) == (False, True)
    assert "http.response.status_code" not in first.attributes
    assert (second.failed, second.attributes["http.response.status_code"]) == (False, 200)
    assert "helios.overtaken" not in second.attributes


def test_what_the_router_answers_itself_has_a_span_too(
    fake_vllm: Callable[..., Control], start_router: StartRouter, found: Collector, wait_for: Any, tmp_path: Path
) -> None:
    router = start_router(fake_vllm("tiny"), tracing=tracing(found), batches=json.dumps({"store": str(tmp_path / "b")}))
    asked = [
        ("GET", "/v1/models", "/v1/models", 200),
        ("GET", "/v1/models/tiny", "/v1/models/{model:path}", 200),
        ("GET", "/v1/files?limit=3", "/v1/files", 200),
        ("GET", "/v1/batches/batch_none", "/v1/batches/{batch}", 404),
        ("GET", CHAT, CHAT, 405),
    ]
    for method, path, route, status in asked:
        trace, span, headers = caller()
        answer = router.request(method, path, headers=headers)
        assert answer.status == status
        (server,) = of_trace(found, wait_for, trace, 1)
        said = server.attributes
        assert (server.kind, server.name, server.parent) == ("server", f"{method} {route}", span)
        assert (said["http.route"], said["http.response.status_code"]) == (route, status)
        assert (said["url.path"], said["helios.request.id"]) == (path.partition("?")[0], answer.header("x-request-id"))
    count = len(found.spans)
    assert [router.request("GET", path).status for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3
    router.stop()
    assert len(found.spans) == count


def test_traces_of_the_routers_own_are_recorded_in_a_share(
    fake_vllm: Callable[..., Control], start_router: StartRouter, found: Collector
) -> None:
    fake = fake_vllm("tiny")
    routers = [start_router(fake, tracing=tracing(found, ratio=ratio)) for ratio in (0, 1)]
    flags = []
    for router in routers:
        assert router.request("POST", CHAT, BODY).status == 200
        flags.append(worker_parent(fake)[3])
        router.stop()  # which sends what still waits
    assert flags == ["00", "01"]
    assert [span.kind for span in found.spans] == ["server", "client"]


def spans(router: RouterProcess, result: str) -> int:
    return int(router.metric("helios_router_spans_total", result=result))


def test_a_collector_that_is_slow_or_away_costs_spans_and_no_request(
    fake_vllm: Callable[..., Control], start_router: StartRouter, found: Collector, wait_for: Any
) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, tracing=tracing(found, queue=3, timeout_s=20))
    found.hold.clear()  # it answers nothing
    assert router.request("POST", CHAT, BODY).status == 200
    wait_for(lambda: found.asked == 1, what="its spans to be under way")
    assert [router.request("POST", CHAT, BODY).status for _ in range(8)] == [200] * 8
    wait_for(lambda: spans(router, "dropped") == 10, what="5 requests of 2 spans to be dropped")
    assert (spans(router, "sent"), spans(router, "failed")) == (0, 0)
    found.hold.set()
    wait_for(lambda: spans(router, "sent") == 8, what="the others to be sent")
    found.status = 400
    assert router.request("POST", CHAT, BODY).status == 200
    wait_for(lambda: spans(router, "failed") == 2, what="its refusal to be counted")
    found.status = 200
    assert router.request("POST", CHAT, BODY).status == 200
    wait_for(lambda: spans(router, "sent") == 10, what="spans to be sent again")
    assert [m["message"] for m in router.messages() if "the collector" in m["message"]] == [
        "the collector takes no spans",
        "the collector takes spans again",
    ]


def test_without_an_endpoint_nothing_of_it_is_loaded() -> None:
    code = (
        "import router.processes.data, router.checked, sys; "
        "print([m for m in sys.modules if m.startswith('router.tracing.') and m != 'router.tracing.settings'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
