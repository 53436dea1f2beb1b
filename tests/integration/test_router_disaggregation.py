"""A real router between fakes that mint, lease and claim KV blocks as vLLM's NIXL connector does: every prompt's blocks
are fetched once, unchanged and in time, and whatever fails costs no request."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.apart import REQUESTS, WARMED, Start, Warm, by_source, said, says, start, texts
from tests.support.routing import RouterProcess, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start", "start_router"]


@pytest.fixture
def pair(fake_vllm: Start, start: Warm) -> tuple[RouterProcess, Control, Control]:
    prefill, decode = fake_vllm(role="prefill", max_model_len=4096), fake_vllm(role="decode", max_model_len=4096)
    return start(1, (prefill, "prefill"), (decode, "decode")), prefill, decode


@pytest.mark.parametrize("path", REQUESTS)
def test_every_api_gets_the_answer_of_one_worker_and_its_prompt_is_computed_elsewhere(
    path: str, pair: tuple[RouterProcess, Control, Control], fake_vllm: Start
) -> None:
    router, prefill, decode = pair
    alone = fake_vllm(max_model_len=4096)
    body = {"model": "tiny", **REQUESTS[path]()}
    answer = router.request("POST", path, body, {"x-request-id": "mine"})
    assert answer.status == 200, answer.body
    expected = RouterProcess(alone.url, router.process, router.log).request("POST", path, body)
    assert said(path, answer.json()) == said(path, expected.json())
    external, local = by_source(decode)
    assert (external - WARMED >= 400, local) == (True, 0)
    assert prefill.kv() == {"held": 0, "stranded": 0, "claimed": 2}
    (first,), (second,) = prefill.journal(path), decode.journal(path)
    ids = [dict(record["headers"])["x-request-id"] for record in (first, second)]
    assert ids == ["mine", "mine"]
    traces = {dict(record["headers"])["traceparent"][:35] for record in (first, second)}
    assert len(traces) == 1
    assert router.metric("helios_router_prefills_total", model="tiny", result="remote") == 1
    assert router.metric("helios_router_prefill_seconds_count", model="tiny") == 1
    if path != "/inference/v1/generate":
        with_stream = {"model": "tiny", **REQUESTS[path](), "stream": True}
        sock, streamed = stream(router.address, path, with_stream)
        found = texts(streamed)
        sock.close()
        sock, streamed = stream(RouterProcess(alone.url, router.process, router.log).address, path, with_stream)
        assert found == texts(streamed)
        sock.close()
        assert by_source(decode)[1] == 0
    assert router.in_flight() == 0


def test_what_a_client_says_of_blocks_is_refused(pair: tuple[RouterProcess, Control, Control]) -> None:
    router, prefill, decode = pair
    answer = router.chat(messages=[says()], kv_transfer_params={"do_remote_prefill": True, "remote_host": "10.0.0.1"})
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "kv_transfer_params"
    assert prefill.journal() == decode.journal() == []


@pytest.mark.parametrize("kind", ["status", "garbage", "reset", "close", "stall", "slow"])
def test_a_prefill_worker_that_fails_costs_no_request(
    kind: str, pair: tuple[RouterProcess, Control, Control], wait_for: Any
) -> None:
    router, prefill, decode = pair
    prefill.fault(kind, times=1, delay_s=30.0, after_bytes=20 if kind in ("reset", "close", "stall") else -1)
    assert router.chat(messages=[says()], max_tokens=4).status == 200
    assert by_source(decode)[0] == WARMED
    assert router.chat(messages=[says()], max_tokens=4).status == 200
    assert by_source(decode)[0] > 400 + WARMED
    assert router.in_flight() == 0
    prefill.skip_time(31)
    wait_for(lambda: prefill.kv()["held"] == 0, what="blocks of the failed ones to go with their lease")


def test_a_prefill_worker_killed_under_load_loses_no_request_and_is_used_again_when_it_is_back(
    pair: tuple[RouterProcess, Control, Control], wait_for: Any
) -> None:
    router, prefill, decode = pair
    stop, statuses = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            statuses.append(router.chat(messages=[says()], max_tokens=4).status)

    with ThreadPoolExecutor(6) as threads:
        for _ in range(6):
            threads.submit(ask)
        wait_for(lambda: len(statuses) > 30, what="requests")
        prefill.refuse()
        before = len(statuses)
        wait_for(lambda: len(statuses) > before + 30, what="requests without it")
        prefill.accept()
        claimed = prefill.kv()["claimed"]
        wait_for(lambda: prefill.kv()["claimed"] > claimed + 5, 30, what="the pair to heal")
        stop.set()
    assert set(statuses) == {200}
    assert by_source(decode)[1] > 0, "meanwhile prompts were computed where they are answered"
    assert router.in_flight() == 0


def test_a_decode_worker_that_fails_before_its_first_byte_is_replaced_by_another(fake_vllm: Start, start: Warm) -> None:
    prefill = fake_vllm(role="prefill", max_model_len=4096)
    one, two = (fake_vllm(role="decode", max_model_len=4096) for _ in range(2))
    retries = json.dumps({"retry_generation": True, "budget_floor_per_s": 100})
    workers = (prefill, "prefill"), (one, "decode"), (two, "decode")
    router = start(2, *workers, args=("--policy", "round-robin"), retries=retries)
    one.fault("reset", times=None)
    for _ in range(4):
        assert router.chat(messages=[says()], max_tokens=4).status == 200
    assert by_source(two)[1] == 0, "each prompt was computed at the prefill worker, anew where it had to be"
    assert router.in_flight() == 0


def test_revisions_are_never_mixed(fake_vllm: Start, start: Warm) -> None:
    old, new = (fake_vllm(role="prefill", max_model_len=4096) for _ in range(2))
    decode = fake_vllm(role="decode", max_model_len=4096)
    router = start(1, (old, "prefill a"), (new, "prefill b"), (decode, "decode b"))
    for _ in range(6):
        assert router.chat(messages=[says()]).status == 200
    assert old.journal() == []
    assert new.kv()["claimed"] == 7


def test_clients_that_leave_end_both_and_nothing_stays(fake_vllm: Start, start: Warm, wait_for: Any) -> None:
    prefill = fake_vllm(role="prefill", prefill_s=0.2, max_model_len=4096)
    decode = fake_vllm(role="decode", token_s=0.05, max_model_len=4096)
    router = start(1, (prefill, "prefill"), (decode, "decode"))

    def leave(after_s: float) -> None:
        body = {"model": "tiny", "messages": [says()], "max_tokens": 200, "stream": True, "ignore_eos": True}
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {len(content)}\r\n\r\n"
        with socket.create_connection(router.address, timeout=10) as sock:
            sock.sendall(head.encode() + content)
            time.sleep(after_s)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4] * 3))
    wait_for(lambda: router.in_flight() == 0, what="nothing under way")
    wait_for(lambda: decode.metric("vllm:num_requests_running") == 0, what="nothing at the decode worker")
    wait_for(lambda: prefill.metric("vllm:num_requests_running") == 0, what="nothing at the prefill worker")
    prefill.skip_time(31)
    assert prefill.kv()["held"] == 0


def test_a_pair_that_is_cold_gets_no_request_and_one_that_was_down_is_warmed_anew(
    fake_vllm: Start, start: Warm, wait_for: Any
) -> None:
    prefill, decode = fake_vllm(role="prefill", max_model_len=4096), fake_vllm(role="decode", max_model_len=4096)
    prefill.fault("status", path="/v1/completions", times=None)
    router = start(0, (prefill, "prefill"), (decode, "decode"))
    assert router.chat(messages=[says()]).status == 200
    assert router.metric("helios_router_prefills_total", result="cold") == 1
    assert prefill.journal("/v1/chat/completions") == []
    prefill.clear_faults()
    wait_for(lambda: router.metric("helios_router_warm_pairs") == 1, 20, what="the pair to be warm")
    assert router.chat(messages=[says()]).status == 200
    assert len(prefill.journal("/v1/chat/completions")) == 1
    claimed = prefill.kv()["claimed"]
    prefill.refuse()
    wait_for(lambda: router.up() == 1, what="the worker to be down")
    prefill.accept()
    wait_for(lambda: prefill.kv()["claimed"] > claimed, 20, what="the pair to be warmed anew")
    assert router.chat(messages=[says()]).status == 200


def test_blocks_are_taken_within_their_lease(fake_vllm: Start, start: Warm) -> None:
    prefill = fake_vllm(role="prefill", lease_s=1.0, max_model_len=4096)
    decode = fake_vllm(role="decode", max_model_len=4096)
    settings = json.dumps({"min_tokens": 64, "lease_s": 1.0})
    router = start(1, (prefill, "prefill"), (decode, "decode"), disaggregation=settings)
    for _ in range(5):
        assert router.chat(messages=[says()], max_tokens=4).status == 200
        time.sleep(0.3)
    counts = prefill.kv()
    assert (counts["claimed"], counts["stranded"]) == (6, 0)
