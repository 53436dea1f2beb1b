"""A real router between fakes of each connector: both get what belongs together, whatever fails ends both, and where a
prompt can't come from the other worker the request is answered all the same, or says why not."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from router.disaggregation.connectors import CONNECTORS, Shape
from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.apart import REQUESTS, Start, Warm, by_source, said, says, start, texts
from tests.support.routing import RouterProcess, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start", "start_router"]
NEW = ("nixl-push", "mooncake", "shared-storage", "cache-threshold", "sglang")
CONCURRENT = ("nixl-push", "mooncake", "sglang")
ALONE = tuple(name for name in NEW if CONNECTORS[name].alone)
"""Those whose decode workers can compute a prompt themselves."""

Made = tuple[RouterProcess, list[Control], list[Control]]
Make = Callable[..., Made]


@pytest.fixture
def make(fake_vllm: Start, start: Warm, tmp_path: Path) -> Make:
    """``make(connector, prefills=1, decodes=1, …)``: a router between that many, all pairs of them warm."""

    def begin(
        connector: str, prefills: int = 1, decodes: int = 1, timeout_s: float = 15, router: Any = None, **fakes: Any
    ) -> Made:
        about = {"connector": connector, "storage": str(tmp_path), "max_model_len": 4096}
        one = [fake_vllm(role="prefill", **about, **fakes.get("prefill", {})) for _ in range(prefills)]
        other = [fake_vllm(role="decode", **about, **fakes.get("decode", {})) for _ in range(decodes)]
        settings = json.dumps({"connector": connector, "min_tokens": 64, "timeout_s": timeout_s})
        pairs = prefills * decodes if CONNECTORS[connector].handshake else 0
        workers = [(fake, "prefill") for fake in one] + [(fake, "decode") for fake in other]
        process = start(pairs, *workers, disaggregation=settings, **(router or {}))
        deadline = time.monotonic() + 20
        while process.up() < len(workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        return process, one, other

    return begin


def chat(router: RouterProcess, **fields: Any) -> Any:
    return router.chat(messages=[says()], **fields)


def settled(router: RouterProcess, wait_for: Any, *fakes: Control) -> None:
    wait_for(lambda: router.in_flight() == 0, what="nothing under way")
    for fake in fakes:
        wait_for(lambda fake=fake: fake.metric("vllm:num_requests_running") == 0, what="nothing at a worker")


@pytest.mark.parametrize("connector", NEW)
def test_every_api_gets_the_answer_of_one_worker_and_its_prompt_is_computed_elsewhere(
    connector: str, make: Make, fake_vllm: Start
) -> None:
    router, (prefill,), (decode,) = make(connector)
    alone = RouterProcess(fake_vllm(max_model_len=4096).url, router.process, router.log)
    before = by_source(decode)[0]
    asked = 0
    for path in sorted(CONNECTORS[connector].routes):
        for streamed in (False, True) if path != "/inference/v1/generate" else (False,):
            body = {"model": "tiny", **REQUESTS[path](), "ignore_eos": True, "stream": streamed}
            if "sampling_params" in body:
                body["sampling_params"]["ignore_eos"] = True
            if streamed:
                found = []
                for one in (router, alone):
                    sock, got = stream(one.address, path, body)
                    found.append(texts(got))
                    sock.close()
                assert found[0] == found[1]
            else:
                answer, expected = (one.request("POST", path, body) for one in (router, alone))
                assert answer.status == 200, answer.body
                assert said(path, answer.json()) == said(path, expected.json())
            asked += 1
    external, local = by_source(decode)
    assert external - before >= 400 * asked
    assert local == 0
    counts = prefill.kv()
    assert (counts["held"], counts["stranded"]) == (0, 0)
    assert router.metric("helios_router_prefills_total", model="tiny", result="remote") == asked
    assert router.in_flight() == 0


@pytest.mark.parametrize("connector", CONCURRENT)
def test_many_at_once_never_meet_the_wrong_ones(connector: str, make: Make, wait_for: Any) -> None:
    """The fakes refuse a room that was used before, and one whose prompts differ."""
    router, prefills, decodes = make(connector, 2, 2, prefill={"prefill_s": 0.02}, decode={"token_s": 0.005})
    with ThreadPoolExecutor(8) as threads:
        same = [{"x-request-id": "the-same"} if number % 2 else {} for number in range(48)]

        def ask(headers: dict[str, str]) -> int:
            body = {"model": "tiny", "messages": [says()], "max_tokens": 6, "ignore_eos": True}
            return router.request("POST", "/v1/chat/completions", body, headers).status

        assert set(threads.map(ask, same)) == {200}
    assert sum(by_source(fake)[1] for fake in decodes) == 0
    settled(router, wait_for, *prefills, *decodes)
    assert all(fake.kv()["held"] == 0 for fake in prefills)


@pytest.mark.parametrize("connector", NEW)
def test_a_prefill_worker_that_fails_costs_no_request(connector: str, make: Make, wait_for: Any) -> None:
    """Where the other worker can't compute a prompt, another prefill worker does."""
    breaker = json.dumps({"enabled": False})
    router, prefills, (decode,) = make(
        connector, 1 if connector in ALONE else 2, timeout_s=1.5, router={"breaker": breaker}
    )
    for kind in ("status", "garbage", "reset", "close", "stall", "slow", "hang"):
        after = 20 if kind in ("reset", "close", "stall") else -1
        prefills[0].fault(kind, times=1, delay_s=30.0, after_bytes=after, path="/v1/chat/completions")
        for _ in range(1 if connector in ALONE else 3):
            answer = chat(router, max_tokens=4, ignore_eos=True)
            assert answer.status == 200, (kind, answer.body)
        prefills[0].clear_faults()
    if connector in ALONE:
        assert router.metric("helios_router_prefills_total", result="remote") == 0
    if connector in ALONE and not CONNECTORS[connector].keeps:
        assert by_source(decode)[1] >= 7 * 400, "it computed them itself"
    settled(router, wait_for, *prefills, decode)
    for prefill in prefills:
        prefill.skip_time(31)
        assert prefill.kv()["held"] == 0


@pytest.mark.parametrize("connector", ["mooncake", "nixl-push"])
def test_a_prefill_worker_killed_under_load_loses_no_request_and_is_used_again(
    connector: str, make: Make, wait_for: Any
) -> None:
    router, (prefill,), (decode,) = make(connector, timeout_s=1)
    stop, statuses = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            statuses.append(chat(router, max_tokens=4, ignore_eos=True).status)

    def remote() -> float:
        return router.metric("helios_router_prefills_total", result="remote")

    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(ask)
        try:
            wait_for(lambda: remote() > 10, 30, what="requests")
            prefill.refuse()
            before = len(statuses)
            wait_for(lambda: len(statuses) > before + 20, 30, what="requests without it")
            prefill.accept()
            healed = remote()
            wait_for(lambda: remote() > healed + 5, 40, what="the pair to heal")
        finally:
            stop.set()
    assert set(statuses) == {200}
    settled(router, wait_for, prefill, decode)


@pytest.mark.parametrize("connector", NEW)
def test_a_decode_worker_that_fails_before_its_first_byte_is_replaced(
    connector: str, make: Make, wait_for: Any
) -> None:
    retries = json.dumps({"retry_generation": True, "budget_floor_per_s": 100})
    router, (prefill,), decodes = make(
        connector, 1, 2, router={"args": ("--policy", "round-robin"), "retries": retries}
    )
    for kind in ("status", "reset", "garbage"):
        decodes[0].clear_faults()
        decodes[0].fault(kind, times=None, path="/v1/chat/completions")
        for _ in range(2):
            answer = chat(router, max_tokens=4, ignore_eos=True)
            assert answer.status == 200, (kind, answer.body)
    if connector != "cache-threshold":  # which has read what the first one had computed
        assert by_source(decodes[1])[1] == 0, "each prompt was computed at the prefill worker"
    settled(router, wait_for, prefill, *decodes)


@pytest.mark.parametrize("connector", NEW)
def test_clients_that_leave_end_both_and_nothing_stays(connector: str, make: Make, wait_for: Any) -> None:
    router, (prefill,), (decode,) = make(connector, prefill={"prefill_s": 0.2}, decode={"token_s": 0.05})

    def leave(after_s: float) -> None:
        body = {"model": "tiny", "messages": [says()], "max_tokens": 200, "stream": True, "ignore_eos": True}
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {len(content)}\r\n\r\n"
        with socket.create_connection(router.address, timeout=10) as sock:
            sock.sendall(head.encode() + content)
            time.sleep(after_s)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(leave, [0.0, 0.05, 0.1, 0.2, 0.25, 0.4] * 3))
    settled(router, wait_for, prefill, decode)
    prefill.skip_time(31)
    assert prefill.kv()["held"] == 0


@pytest.mark.parametrize("connector", CONCURRENT)
def test_when_both_workers_say_nothing_there_is_an_end(connector: str, make: Make, wait_for: Any) -> None:
    router, (prefill,), (decode,) = make(connector, timeout_s=0.5, router={"first_byte_timeout_s": 1})
    for fake in (prefill, decode):
        fake.fault("hang", times=None, path="/v1/chat/completions")
    began = time.monotonic()
    answer = chat(router, max_tokens=4)
    assert answer.status == (504 if connector in ALONE else 503)
    assert time.monotonic() - began < 10
    settled(router, wait_for, prefill, decode)


def test_a_worker_that_can_compute_no_prompt_needs_another_one_for_every_request(make: Make, wait_for: Any) -> None:
    router, (prefill,), (decode,) = make("sglang")
    assert router.chat().status == 200, "short as it is"
    assert by_source(decode)[1] == 0
    prefill.refuse()
    wait_for(lambda: router.up() == 1, what="the worker to be down")
    answer = chat(router)
    assert (answer.status, answer.json()["error"]["code"]) == (503, "no_prefill_worker")
    prefill.accept()
    wait_for(lambda: chat(router).status == 200, 20, what="it to be back")


def test_what_the_worker_that_computes_says_of_a_wrong_request_reaches_the_client(make: Make) -> None:
    router, _, _ = make("sglang")
    answer = chat(router, max_tokens=100_000)
    assert answer.status == 400
    assert "max_tokens" in answer.json()["error"]["message"]


def test_a_storage_that_has_the_prompt_needs_no_other_worker(make: Make) -> None:
    router, (prefill,), decodes = make("cache-threshold", 1, 2, router={"args": ("--policy", "round-robin")})
    message = says()
    for _ in range(4):
        assert router.chat(messages=[message], max_tokens=4).status == 200
    assert len(prefill.journal("/v1/chat/completions")) == 1
    assert router.metric("helios_router_prefills_total", result="cached") >= 1
    assert sum(by_source(fake)[1] for fake in decodes) == 0


def test_a_worker_that_was_started_anew_is_met_anew(make: Make, wait_for: Any) -> None:
    router, (prefill,), (decode,) = make("mooncake")
    for _ in range(2):
        prefill.refuse()
        wait_for(lambda: router.metric("helios_router_warm_pairs") == 0, 20, what="the worker to be down")
        prefill.accept()
        wait_for(lambda: router.metric("helios_router_warm_pairs") == 1, 20, what="the pair to be warm")
        assert chat(router, max_tokens=4, ignore_eos=True).status == 200
    assert by_source(decode)[1] == 0


@pytest.mark.parametrize(
    "field",
    [
        {"bootstrap_host": "10.0.0.1"}, {"bootstrap_port": 8998}, {"bootstrap_room": 7}, {"bootstrap_pair_key": "k"},
        {"disagg_prefill_dp_rank": 0}, {"cache_hit_threshold": 0.5}, {"kv_transfer_params": {}},
    ],
)  # fmt: skip
def test_what_a_client_says_of_blocks_is_refused(field: dict[str, Any], make: Make) -> None:
    router, (prefill,), (decode,) = make("sglang")
    answer = chat(router, **field)
    assert answer.status == 400
    assert answer.json()["error"]["param"] == next(iter(field))
    assert prefill.journal() == decode.journal() == []


def test_the_table_is_all_tested_here() -> None:
    assert {"nixl", *NEW} == set(CONNECTORS)
    assert set(CONCURRENT) == {name for name, one in CONNECTORS.items() if one.shape is Shape.CONCURRENT}
