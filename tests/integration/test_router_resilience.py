"""Workers that fail, hang or lag under a real router: who gets the requests, what is repeated, and what comes back."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import RouterProcess, StartRouter, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
ALWAYS: dict[str, Any] = {"kind": "status", "status": 503, "times": None}
NO_BREAKER = json.dumps({"enabled": False})


@pytest.fixture
def start(start_router: StartRouter) -> StartRouter:
    """Starts a router that shares requests out evenly, so that each worker has its part of them."""
    return partial(start_router, args=("--policy", "least-requests"))


def embed(router: RouterProcess, **headers: str) -> Any:
    return router.request("POST", "/v1/embeddings", {"model": "tiny", "input": "hello"}, headers)


def counts(*fakes: Control) -> list[int]:
    return [len(fake.journal()) for fake in fakes]


def test_a_worker_that_fails_is_left_out_until_it_works_again(
    fake_vllm: Start, start: StartRouter, wait_for: Any
) -> None:
    bad, good = fake_vllm("tiny"), fake_vllm("tiny")
    bad.fault(**ALWAYS)
    breaker = {"failures": 3, "open_s": 30, "jitter": 0, "successes": 2}
    retries = {"budget_floor_per_s": 10}
    router = start(bad, good, breaker=json.dumps(breaker), retries=json.dumps(retries))
    for _ in range(20):
        assert router.chat().status == 200  # no client sees it
    assert counts(bad, good) == [3, 20]
    assert router.metric("helios_router_retries_total", reason="not_taken") == 3
    assert router.metric("helios_router_breaker_state", worker=bad.url) == 2
    assert router.metric("helios_router_breaker_state", worker=good.url) == 0
    assert router.metric("helios_router_breaker_openings_total", worker=bad.url) == 1
    assert router.up() == 2
    router.stop()

    router = start(bad, good, breaker=json.dumps({**breaker, "open_s": 0.3}), retries=json.dumps(retries))
    for _ in range(6):
        assert router.chat().status == 200
    assert router.metric("helios_router_breaker_state", worker=bad.url) > 0
    bad.clear_faults()

    def closed() -> bool:
        assert router.chat().status == 200
        return router.metric("helios_router_breaker_state") == 0

    wait_for(closed, what="the breaker to close")
    before = counts(bad, good)
    for _ in range(6):
        router.chat()
    assert [after - n for after, n in zip(counts(bad, good), before, strict=True)] == [3, 3]


def test_when_all_fail_the_load_does_not_multiply(fake_vllm: Start, start: StartRouter) -> None:
    fakes = [fake_vllm("tiny") for _ in range(3)]
    for fake in fakes:
        fake.fault(**ALWAYS)
    retries = {"most": 2, "budget_ratio": 0.2, "budget_floor_per_s": 0.2}
    router = start(*fakes, retries=json.dumps(retries), breaker=json.dumps({"failures": 4, "open_s": 60}))
    answer = router.chat()
    assert (answer.status, answer.json()["error"]["message"]) == (503, "a fault was ordered")
    assert sum(counts(*fakes)) == 3  # one try and two more, each elsewhere
    assert counts(*fakes) == [1, 1, 1]
    for _ in range(39):
        assert router.chat().status == 503
    assert sum(counts(*fakes)) <= 40 + 40 * 0.2 + 2 * 2
    assert router.metric("helios_router_retry_budget_exhausted_total", model="tiny") > 0
    assert router.metric("helios_router_breaker_state") == 6  # all open: the least bad is used all the same
    assert router.metric("helios_router_failed_open_total") > 0
    fakes[0].clear_faults()
    fakes[1].clear_faults()
    fakes[2].clear_faults()
    assert Counter(router.chat().status for _ in range(12)) == {200: 12}
    assert router.metric("helios_router_breaker_state") < 6  # and closes when it works, without waiting


def test_what_is_repeated_and_what_is_not(fake_vllm: Start, start: StartRouter) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    router = start(one, two, breaker=NO_BREAKER)

    def tries(send: Callable[[], Any], kind: str, **fields: Any) -> tuple[int, int]:
        before = sum(counts(one, two))
        for fake in (one, two):
            fake.clear_faults()
            fake.fault(kind, **fields)
        status = send().status
        return status, sum(counts(one, two)) - before

    assert tries(router.chat, "reset") == (502, 1)
    assert tries(lambda: embed(router), "reset") == (502, 2)
    assert tries(router.chat, "status", status=502) == (502, 1)  # a proxy before a worker that may be at it
    assert tries(router.chat, "status", status=500) == (500, 1)
    assert tries(router.chat, "status", status=429) == (429, 1)
    assert tries(lambda: embed(router), "status", status=502) == (502, 2)
    assert tries(lambda: embed(router), "status", status=500) == (500, 1)
    assert tries(lambda: embed(router), "garbage") == (502, 2)
    one.clear_faults()
    two.clear_faults()
    one.fault("reset", times=None)
    assert [embed(router).status for _ in range(4)] == [200] * 4
    assert router.in_flight() == 0


def test_by_configuration_generation_is_repeated_too(fake_vllm: Start, start: StartRouter) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    one.fault("reset", times=None)
    retries = {"retry_generation": True, "retry_429": True, "budget_floor_per_s": 10}
    router = start(one, two, breaker=NO_BREAKER, retries=json.dumps(retries))
    assert [router.chat(stream=n % 2 == 0).status for n in range(8)] == [200] * 8
    assert counts(one, two) == [8, 8]
    one.clear_faults()
    one.fault("status", status=429, times=None)
    assert [router.chat().status for _ in range(4)] == [200] * 4
    one.clear_faults()
    one.fault("reset", times=None, after_bytes=10)  # a byte was passed on: that can't be taken back
    assert router.metric("helios_router_retries_total", reason="limited") > 0
    before = router.metric("helios_router_retries_total")
    for _ in range(4):
        with suppress(http.client.HTTPException, ConnectionError):
            router.chat()
    assert router.metric("helios_router_retries_total") == before


def test_a_slow_worker_is_left_out_for_a_time(fake_vllm: Start, start: StartRouter, wait_for: Any) -> None:
    slow, *fast = fake_vllm("tiny", prefill_s=0.4), fake_vllm("tiny"), fake_vllm("tiny")
    outliers = {"interval_s": 0.2, "min_requests": 3, "slow_margin_s": 0.2, "eject_s": 1}
    router = start(slow, *fast, outliers=json.dumps(outliers))

    def ejected() -> float:
        with ThreadPoolExecutor(6) as pool:
            assert Counter(pool.map(lambda _: router.chat().status, range(6))) == {200: 6}
        return router.metric("helios_router_ejections_total", worker=slow.url, reason="slow")

    wait_for(ejected, what="the slow worker to be ejected")
    before = len(slow.journal())
    assert [router.chat().status for _ in range(4)] == [200] * 4
    assert len(slow.journal()) == before
    wait_for(lambda: router.chat().status == 200 and len(slow.journal()) > before, what="it to be tried again")
    assert router.metric("helios_router_ejections_total", worker=fast[0].url) == 0


HANG = {"quiet_s": 0.4, "timeout_s": 0.4, "every_s": 0.2}


def test_a_worker_that_answers_health_but_hangs_is_found_and_comes_back(
    fake_vllm: Start, start: StartRouter, wait_for: Any
) -> None:
    hanging, good = fake_vllm("tiny"), fake_vllm("tiny")
    router = start(hanging, good, hang=json.dumps(HANG))
    assert [router.chat().status for _ in range(4)] == [200] * 4
    assert hanging.journal("/v1/completions") == []  # who is not doubted is not asked
    hanging.fault("hang", times=None)
    statuses: list[int] = []
    waiting = [threading.Thread(target=lambda: statuses.append(embed(router).status)) for _ in range(2)]
    for thread in waiting:
        thread.start()
    wait_for(lambda: router.metric("helios_router_worker_hung", worker=hanging.url), what="the hang to be found")
    for thread in waiting:
        thread.join(10)
    assert statuses == [200, 200]  # what may be repeated did not wait for it
    assert router.metric("helios_router_retries_total", reason="hung") == 1
    assert router.up() == 2  # /health says that all is well
    served = len(good.journal())
    assert [router.chat().status for _ in range(6)] == [200] * 6
    assert len(good.journal()) == served + 6
    (check, *_) = hanging.journal("/v1/completions")
    assert check["body_bytes"] < 80
    assert router.metric("helios_router_token_checks_total", worker=good.url) == 0

    good.refuse()  # now nobody is left, and the client is told why
    wait_for(lambda: router.up() == 1, what="the other to be down")
    answer = router.chat()
    assert answer.status == 503
    assert "gave no token within 0.4 s" in answer.json()["error"]["message"]
    hanging.clear_faults()
    wait_for(lambda: router.metric("helios_router_worker_hung") == 0, what="the worker to be back")
    assert router.chat().status == 200
    texts = [line["message"] for line in router.messages()]
    assert texts.count("a worker hangs") == texts.count("a worker generates again") == 1


def test_a_full_worker_is_not_taken_for_one_that_hangs(fake_vllm: Start, start: StartRouter, wait_for: Any) -> None:
    full = fake_vllm("tiny", token_s=0.02)
    full.fault("hang", path="/v1/completions", times=None)  # the check would wait in a queue
    router = start(full, hang=json.dumps(HANG))
    results: list[int] = []
    long = threading.Thread(target=lambda: results.append(router.chat(max_tokens=120).status))  # not streamed: silent
    long.start()
    wait_for(lambda: router.metric("helios_router_token_checks_total", result="busy"), what="the check")
    long.join(20)
    assert results == [200]
    assert router.metric("helios_router_token_checks_total", result="failed") == 0
    assert "a worker hangs" not in [line["message"] for line in router.messages()]


def test_fallbacks_to_another_model_and_to_another_endpoint(
    fake_vllm: Start, start: StartRouter, tmp_path: Path, wait_for: Any
) -> None:
    big, small, cloud = fake_vllm("big"), fake_vllm("small"), fake_vllm("gpt")
    (tmp_path / "key").write_text("cloud-key\n")
    endpoint = {"model": "gpt", "url": f"{cloud.url}/v1", "key_file": str(tmp_path / "key"), "drop": ["ignore_eos"]}
    rules = [{"model": "big", "to": [{"model": "small"}, endpoint]}]
    router = start(big, small, fallbacks=json.dumps(rules), health_interval_s=60)
    private = {"authorization": "Bearer client-key", "cookie": "a=1", "x-request-id": "id-7"}
    body = {"model": "big", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "ignore_eos": True}

    def ask(**fields: Any) -> Any:
        return router.request("POST", "/v1/chat/completions?a=b", {**body, **fields}, private)

    assert ask().header("x-helios-fallback") is None
    big.refuse()
    answer = ask()
    assert (answer.status, answer.json()["model"]) == (200, "small")
    assert answer.header("x-helios-fallback") == "small"
    assert dict(small.journal()[-1]["headers"])["authorization"] == "Bearer client-key"
    assert cloud.journal() == []

    small.refuse()
    for stream in (False, True):
        answer = ask(stream=stream)
        assert answer.status == 200
        assert b'"model":"gpt"' in answer.body
        assert answer.header("x-helios-fallback") == "gpt"
        assert answer.header("x-request-id") == "id-7"
        record = cloud.journal()[-1]
        sent = dict(record["headers"])
        assert record["target"] == "/v1/chat/completions"
        assert (sent["authorization"], sent["x-request-id"]) == ("Bearer cloud-key", "id-7")
        assert "cookie" not in sent
        assert "client-key" not in str(record)
    assert router.metric("helios_router_fallbacks_total", model="big") == 3
    cloud.refuse()
    answer = ask()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "no_healthy_worker")
    big.accept()
    wait_for(lambda: router.up() == 2 or ask().status in (200, 503), what="an answer")
    assert router.in_flight() == 0


def test_ids_go_to_the_worker_and_stand_in_the_log(fake_vllm: Start, start: StartRouter) -> None:
    fake = fake_vllm("tiny")
    router = start(fake)
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"x-request-id": "mine", "traceparent": f"00-{trace}-00f067aa0ba902b7-01", "tracestate": "v=1"}
    fake.fault("reset")
    answer = router.request("POST", "/v1/completions", {"model": "tiny", "prompt": "x"}, headers)
    assert (answer.status, answer.header("x-request-id")) == (502, "mine")
    sent = dict(fake.journal()[-1]["headers"])
    assert sent["x-request-id"] == "mine"
    assert sent["tracestate"] == "v=1"
    assert re.fullmatch(rf"00-{trace}-(?!00f067aa0ba902b7)[0-9a-f]{{16}}-01", sent["traceparent"])
    (line,) = [line for line in router.messages() if line["message"] == "a request failed"]
    assert (line["request_id"], line["trace_id"], line["span_id"]) == ("mine", trace, sent["traceparent"][36:52])
    answer = router.request("POST", "/v1/completions", {"model": "tiny", "prompt": "x"}, {"traceparent": "00-1-2-3"})
    sent = dict(fake.journal()[-1]["headers"])
    assert answer.header("x-request-id") == sent["x-request-id"]
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", sent["traceparent"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"breaker": {"open_s": 0}}, "router.breaker.open_s must be more than 0"),
        ({"breaker": {"opens": 1}}, "unknown field"),
        ({"disaggregation": {"lease_s": 0}}, "router.disaggregation.lease_s must be more than 0"),
        ({"retries": {"most": -1}}, "router.retries.most must not be less than 0"),
        ({"outliers": {"max_share": 2}}, "router.outliers.max_share is a share"),
        ({"fallbacks": [{"model": "m", "to": [{"model": "m"}]}]}, "its own fallback"),
    ],
)
def test_settings_that_can_not_work_are_refused(helios: Any, settings: dict[str, Any], message: str) -> None:
    ((name, value),) = settings.items()
    environ = {f"HELIOS_ROUTER__{name.upper()}": json.dumps(value)}
    result = helios("router", "--port", "0", "--worker", "m=http://127.0.0.1:1", env=environ, code=2)
    assert message in result.err
