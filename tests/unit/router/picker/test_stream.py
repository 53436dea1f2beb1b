"""What a gateway is answered, message by message: the cases of the endpoint picker protocol."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.config import AdmissionSettings, FallbackRule, FallbackTarget, LimitSettings, QueueSettings
from router.health import State
from router.worker_metrics import WorkerMetrics
from router.workers import parse_worker
from tests.support.picking import (
    BODY,
    ENDED,
    Site,
    Talk,
    answer,
    body,
    destination,
    head,
    passed_on,
    piece,
    refused,
    trailers,
)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


async def asked(site: Site, *messages: Any) -> list[Any]:
    talk = Talk(site)
    talk.says(*messages)
    return await talk.ends()


@in_loop
async def test_a_request_goes_to_a_worker_and_counts_there() -> None:
    site = Site()
    answers = await asked(site, head(), body())
    assert destination(answers) in ("10.0.0.1:80", "10.0.0.2:80")
    assert passed_on(answers) == BODY
    assert sorted(site.in_flight) == [0, 0, 1]
    site.later(61)
    site.settled()
    assert site.metrics.registry.get_sample_value("helios_router_picks_outlived_total") == 1
    answers = await asked(site, head(), body(b'{"model": "n"}'))
    assert destination(answers) == "[fd00::3]:80"


@given(st.lists(st.integers(0, 200_000), max_size=6), st.booleans(), st.booleans())
def test_a_body_cut_anywhere_comes_whole(cuts: list[int], empty_end: bool, trailing: bool) -> None:
    content = json.dumps({"model": "m", "prompt": "é" * 60_000}).encode()
    places = sorted({0, len(content), *(cut % len(content) for cut in cuts)})
    pieces = [content[a:b] for a, b in pairwise(places)]

    async def run() -> None:
        site = Site()
        messages = [body(one, ended=False) for one in pieces]
        if trailing:
            messages.append(trailers())
        elif empty_end:
            messages.append(body(b""))
        else:
            messages[-1] = body(pieces[-1])
        answers = await asked(site, head(("te", "trailers")), *messages)
        assert destination(answers)
        if trailing:
            assert answers.pop().WhichOneof("response") == "request_trailers"
            last = answers[-1].request_body.response.body_mutation.streamed_response
            assert not last.end_of_stream
            last.end_of_stream = True
        assert passed_on(answers) == content
        site.picker.ledger.close()
        site.settled()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("messages", "status", "code"),
    [
        ((head(), body(b"{")), 400, "invalid_json"),
        ((head(), body(b"")), 400, "invalid_json"),
        ((head(ended=True),), 400, "invalid_json"),
        ((head(), body(b'{"messages": []}')), 404, "model_not_found"),
        ((head(), body(b'{"model": "none"}')), 404, "model_not_found"),
        ((head(), body(b'{"model": "m", "kv_transfer_params": {"x": 1}}')), 400, "forbidden_parameter"),
        ((head((":path", "/sleep")), body()), 404, "unknown_url"),
        ((head((":path", "/V1/chat/completions")), body()), 404, "unknown_url"),
        ((head((":method", "GET"), ended=True),), 405, "method_not_allowed"),
        ((head((":path", "/v1/chat/completions?x=\xff")), body()), 400, "invalid_url"),
        ((head(("content-encoding", "gzip")), body()), 415, "unsupported_content_encoding"),
        ((head(), body(b"x" * (1 << 20), ended=False), body(b"x", ended=False)), 413, "request_too_large"),
        ((head(mode=2), body()), 500, "gateway_mode"),
        ((head(mode=0), body()), 500, "gateway_mode"),
        ((head((":method", "GET"), (":path", "/v1/models/none"), ended=True),), 404, "model_not_found"),
    ],
)
@in_loop
async def test_what_cannot_be_sent_anywhere_is_answered_at_once(messages: Any, status: int, code: str) -> None:
    site = Site(max_body_mib=1)
    found = refused(await asked(site, *messages))
    assert found[:2] == (status, code)
    assert (found[2]["content-type"], found[2]["x-request-id"]) == ("application/json", "one")
    assert site.metrics.registry.get_sample_value("helios_router_picks_total", {"result": code}) == 1
    site.settled()


@in_loop
async def test_the_list_of_models_is_answered_here() -> None:
    (only,) = await asked(Site(), head((":method", "GET"), (":path", "/v1/models"), ended=True))
    said = only.immediate_response
    assert said.status.code == 200
    assert [one["id"] for one in json.loads(said.body)["data"]] == ["m", "n"]


@in_loop
async def test_where_no_worker_is_up_a_client_is_told_when_to_come_back() -> None:
    site = Site()
    for worker in site.workers.all:
        worker.health.judged(State.DOWN, "it is down")
    status, code, headers = refused(await asked(site, head(), body()))
    assert (status, code, headers["retry-after"]) == (503, "no_healthy_worker", "2")
    site.settled()


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        (["10.0.0.2:80"], "10.0.0.2:80"),
        ("10.0.0.9:80, 10.0.0.2:80", "10.0.0.2:80"),
        (["10.0.0.2"], "10.0.0.2:80"),
        (["10.0.0.9:80"], None),
        (["[fd00::3]:80"], None),
        ([], None),
        ("", None),
        (7.0, None),
    ],
)
@in_loop
async def test_only_endpoints_of_the_subset_are_chosen(subset: Any, expected: str | None) -> None:
    """The best of them, also where all others are better; nobody where none of them serves the model."""
    site = Site(policy="least-requests")
    busy = site.workers.at("http://10.0.0.2:80")
    assert busy is not None
    leases = [site.workers.lease(busy) for _ in range(9)]
    answers = await asked(site, head(subset=subset), body())
    if expected is None:
        assert refused(answers)[:2] == (503, "no_healthy_worker")
    else:
        assert destination(answers) == expected
    for lease in leases:
        lease.end()


@in_loop
async def test_who_waits_stays_inside_the_subset() -> None:
    site = Site(admission=AdmissionSettings(queue=QueueSettings(per_worker=1)))
    first = site.workers.at("http://10.0.0.1:80")
    assert first is not None
    lease = site.workers.lease(first)
    talk = Talk(site)
    talk.says(head(subset=["10.0.0.1:80"]), body())
    assert await talk.settle() == []
    lease.end()
    assert site.admission is not None
    site.admission.freed(first)
    assert destination(await talk.ends()) == "10.0.0.1:80"


@in_loop
async def test_workers_without_an_ip_address_are_left_out() -> None:
    site = Site(("m=http://gpu-1:80", "m=http://10.0.0.2:80/base", "m=http://10.0.0.3:80"))
    for _ in range(3):
        assert destination(await asked(site, head(), body())) == "10.0.0.3:80"
    alone = Site(("m=http://gpu-1:80",), admission=AdmissionSettings(queue=QueueSettings(per_worker=1)))
    assert refused(await asked(alone, head(), body()))[:2] == (503, "no_healthy_worker")


@in_loop
async def test_the_next_ones_are_named_behind_the_first_the_least_busy_first() -> None:
    workers = tuple(f"m=http://10.0.0.{n}:80" for n in range(1, 5))
    site = Site(workers, endpoints=3)
    leases = [site.workers.lease(w) for n, w in enumerate(site.workers.all) for _ in range(n)]
    assert destination(await asked(site, head(), body())) == "10.0.0.1:80,10.0.0.2:80,10.0.0.3:80"
    allowed = head(subset=["10.0.0.4:80", "10.0.0.2:80"])
    assert destination(await asked(site, allowed, body())) == "10.0.0.2:80,10.0.0.4:80"
    for lease in leases:
        lease.end()


@in_loop
async def test_an_alias_is_replaced_and_a_fallback_serves() -> None:
    elsewhere = FallbackTarget(model="x", url="http://10.9.9.9/v1")
    rules = [FallbackRule("m", [elsewhere, FallbackTarget(model="n")])]
    site = Site(aliases={"other": "m"}, fallbacks=rules)
    answers = await asked(site, head(), body(b'{"model": "other", "n": 1}'))
    assert passed_on(answers) == b'{"model": "m", "n": 1}'
    lengths = [h.header.raw_value for h in answers[0].request_headers.response.header_mutation.set_headers]
    assert b"22" in lengths
    for worker in site.workers.of("m"):
        worker.health.judged(State.DOWN, "it is down")
    answers = await asked(site, head(), body())
    assert destination(answers) == "[fd00::3]:80"  # a gateway can't be sent beyond the workers
    assert json.loads(passed_on(answers))["model"] == "n"


@in_loop
async def test_a_limit_that_is_reached_sheds_and_what_was_taken_stays_taken() -> None:
    limits = {"m": LimitSettings(requests_per_minute=2)}
    site = Site(admission=AdmissionSettings(models=limits))
    for _ in range(2):
        assert destination(await asked(site, head(), body()))
    status, code, headers = refused(await asked(site, head(), body()))
    assert (status, code) == (429, "rate_limit_exceeded")
    assert int(headers["retry-after"]) > 0


@in_loop
async def test_an_adapter_is_sent_where_it_is_loaded_before_where_there_is_room() -> None:
    workers = ("m=http://10.0.0.1:80,adapter=lora", "m=http://10.0.0.2:80,adapter=lora")
    site = Site(workers, policy="lora-affinity")
    for worker, running, usage in zip(site.workers.all, ("lora", "other"), (0.9, 0.1), strict=True):
        worker.metrics = WorkerMetrics(time.monotonic(), 0, 3, 0, usage, frozenset({running}), frozenset(), 1)
    for _ in range(3):
        answers = await asked(site, head(("x-gateway-inference-objective", "none")), body(b'{"model": "lora"}'))
        assert destination(answers) == "10.0.0.1:80"


@in_loop
async def test_what_names_hosts_to_a_sidecar_is_removed() -> None:
    answers = await asked(Site(), head(("x-prefiller-host-port", "10.9.9.9:1")), body())
    assert list(answers[0].request_headers.response.header_mutation.remove_headers) == ["x-prefiller-host-port"]


@in_loop
async def test_a_gateway_that_is_followed_keeps_its_place_to_the_end() -> None:
    site = Site(response="follow")
    talk = Talk(site)
    talk.says(head(response_mode=4), body())
    answers = await talk.settle()
    assert destination(answers)
    talk.says(answer(200), piece(b"abc"), piece(b"", ended=True))
    answers = (await talk.settle())[2:]
    assert [one.WhichOneof("response") for one in answers] == ["response_headers", "response_body", "response_body"]
    pieces = [one.response_body.response.body_mutation.streamed_response for one in answers[1:]]
    assert [(one.body, one.end_of_stream) for one in pieces] == [(b"abc", False), (b"", True)]
    assert sorted(site.in_flight) == [0, 0, 1]
    talk.says(ENDED)
    await talk.ends()
    site.settled()


@in_loop
async def test_statuses_that_are_seen_open_a_breaker_and_who_served_counts() -> None:
    site = Site(response="follow", endpoints=2)
    for _ in range(20):
        talk = Talk(site)
        talk.says(head(subset=["10.0.0.1:80", "10.0.0.2:80"]), body())
        first, second = destination(await talk.settle()).split(",")
        served, status = (second, 200) if first == "10.0.0.1:80" else (first, 200)
        talk.says(answer(status, served))
        await talk.settle()
        assert site.workers.at("http://10.0.0.2:80").in_flight == 1  # type: ignore[union-attr]
        talk.says(ENDED)
        await talk.ends()
    assert not site.workers.at("http://10.0.0.1:80").guard.clear  # type: ignore[union-attr]
    assert site.workers.at("http://10.0.0.2:80").guard.clear  # type: ignore[union-attr]
    site.settled()


@pytest.mark.parametrize("response", ["leave", "follow"])
@in_loop
async def test_whoever_leaves_at_any_time_leaves_nothing_behind(response: str) -> None:
    said = [head(), body(BODY[:5], ended=False), body(BODY[5:]), answer(200), piece(b"x")]
    for count in range(len(said) + 1):
        for cancelled in (False, True):
            site = Site(response=response)
            talk = Talk(site)
            talk.says(*said[:count])
            await talk.settle()
            if cancelled:
                talk.task.cancel()
                await asyncio.wait((talk.task,))
            else:
                talk.says(ENDED)
                await talk.ends()
            site.picker.ledger.close()
            site.settled()


@in_loop
async def test_a_body_that_stops_coming_and_the_routers_end_are_answered() -> None:
    site = Site()
    talk = Talk(site)
    talk.says(head(), body(b"{", ended=False))
    await talk.settle()
    site.later(11)
    assert refused(await talk.ends())[:2] == (408, "request_timeout")
    talk = Talk(site)
    talk.says(head())
    await talk.settle()
    site.relay.cut()
    assert refused(await talk.ends())[:2] == (503, "router_shutdown")
    site.settled()


@in_loop
async def test_at_the_routers_end_a_gateway_that_is_followed_is_left_in_order() -> None:
    site = Site(response="follow")
    talk = Talk(site)
    talk.says(head(), body())
    assert len(await talk.settle()) == 2
    site.relay.cut()
    assert len(await talk.ends()) == 2
    site.settled()


@in_loop
async def test_more_streams_than_there_may_be_are_told_so() -> None:
    site = Site(max_streams=1)
    site.picker.streams = 1
    assert refused(await asked(site, head(), body()))[:2] == (503, "too_many_connections")


@in_loop
async def test_a_worker_that_comes_later_is_chosen_and_one_that_left_is_not() -> None:
    site = Site()
    site.workers.apply("file", [parse_worker("new=http://10.0.0.7:80")])
    new = site.workers.at("http://10.0.0.7:80")
    assert new is not None
    new.health.judged(State.UP, "")
    assert destination(await asked(site, head(), body(b'{"model": "new"}'))) == "10.0.0.7:80"
    site.workers.apply("file", [])
    assert refused(await asked(site, head(), body(b'{"model": "new"}')))[0] == 503
    assert new.in_flight == 1
    new.metrics = WorkerMetrics(site.now + 1, 1, 0, 0, 0.0)
    site.later(2)
    assert site.workers.at("http://10.0.0.7:80") is None
