"""Workers that fail in every way, clients that leave: what is retried, what is said, and that nothing stays behind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import CHAT, RouterProcess, StartRouter, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
CLIENTS = "/v1/chat/completions"
"""Pairs are warmed elsewhere."""
LONG: dict[str, Any] = {"model": "tiny", **CHAT, "max_tokens": 900, "stream": True}


@pytest.fixture
def killable() -> Iterator[tuple[Control, subprocess.Popen[str]]]:
    """A fake in a process of its own."""
    command = [sys.executable, "-m", "tests.fakes.vllm", "--model", "tiny", "--token-s", "0.02"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        urls = json.loads(process.stdout.readline())
        yield Control(urls["url"], urls["control"], "tiny"), process
        process.kill()


def test_requests_spread_evenly_over_idle_workers(fake_vllm: Start, start_router: StartRouter) -> None:
    fakes = [fake_vllm("tiny") for _ in range(3)]
    router = start_router(*fakes, args=("--policy", "least-requests"))
    for _ in range(30):
        assert router.chat().status == 200
    assert [len(fake.journal()) for fake in fakes] == [10, 10, 10]


def test_a_busy_worker_gets_no_more_while_others_are_idle(fake_vllm: Start, start_router: StartRouter) -> None:
    slow, *fast = (fake_vllm("tiny"), fake_vllm("tiny"), fake_vllm("tiny"))
    slow.fault("stall", after_bytes=10, times=None)
    router = start_router(slow, *fast, args=("--policy", "least-requests"))
    sock, answer = stream(router.address, "/v1/chat/completions", LONG)
    while not slow.journal():  # the first goes to one of the three, until the slow one has its stream
        answer.close()
        sock.close()
        sock, answer = stream(router.address, "/v1/chat/completions", LONG)
    with sock, answer:
        for _ in range(20):
            assert router.chat().status == 200
        assert len(slow.journal()) == 1
    slow.clear_faults()


def test_prefill_workers_get_no_requests_of_clients(fake_vllm: Start, start_router: StartRouter) -> None:
    prefill, decode = fake_vllm("tiny", role="prefill"), fake_vllm("tiny", role="decode")
    router = start_router(f"tiny={prefill.url},role=prefill", f"tiny={decode.url},role=decode")
    for _ in range(6):
        assert router.chat().status == 200
    assert (len(prefill.journal(CLIENTS)), len(decode.journal(CLIENTS))) == (0, 6)
    decode.refuse()
    answer = router.chat()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "no_healthy_worker")
    assert prefill.journal(CLIENTS) == []
    decode.accept()


def test_each_model_has_its_own_workers(fake_vllm: Start, start_router: StartRouter) -> None:
    one, two = fake_vllm("one"), fake_vllm("two")
    router = start_router(one, two)
    assert [router.chat(model=name).json()["model"] for name in ("one", "two", "one")] == ["one", "two", "one"]
    assert [card["id"] for card in router.request("GET", "/v1/models").json()["data"]] == ["one", "two"]
    two.refuse()
    assert router.chat(model="two").status == 503
    assert router.chat(model="one").status == 200
    listed = router.request("GET", "/v1/models").json()["data"]
    assert [card["max_model_len"] for card in listed] == [1024, 1024]  # a model that is down stays listed
    two.accept()


def test_a_worker_that_refuses_loses_no_request(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    router = start_router(one, two, health_interval_s=60)  # so the requests find out, not the checks
    one.refuse()
    with ThreadPoolExecutor(8) as pool:
        assert Counter(a.status for a in pool.map(lambda _: router.chat(), range(40))) == {200: 40}
    assert router.metric("helios_router_retries_total", reason="not_sent") >= 1
    assert router.up() == 1
    tried = router.metric("helios_router_retries_total")
    assert router.chat().status == 200
    assert router.metric("helios_router_retries_total") == tried  # a worker that is down is not tried


def test_worker_comes_back(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, health_interval_s=0.1)
    fake.refuse()
    wait_for(lambda: router.up() == 0, what="down")
    answer = router.chat()
    assert answer.status == 503
    assert answer.header("retry-after") == "1"
    assert "connection refused" in answer.json()["error"]["message"]
    fake.accept()
    wait_for(lambda: router.up() == 1, what="up")
    assert router.chat().status == 200
    assert [m["message"] for m in router.messages() if m["message"].startswith("a worker is")] == [
        "a worker is up", "a worker is down", "a worker is up",
    ]  # fmt: skip


def test_an_unhealthy_worker_gets_nothing_though_it_would_answer(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    router = start_router(one, two, health_interval_s=0.1)
    one.set_healthy(False)
    wait_for(lambda: router.up() == 1, what="one down")
    for _ in range(6):
        assert router.chat().status == 200
    assert (len(one.journal()), len(two.journal())) == (0, 6)
    two.set_healthy(False)
    wait_for(lambda: router.up() == 0, what="both down")
    assert "/health answered 503" in router.chat().json()["error"]["message"]


def test_a_kept_connection_that_the_worker_closed_is_replaced(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake)
    assert router.chat().status == 200
    fake.fault("close")  # the next request finds its kept connection closed under it
    assert router.chat().status == 200
    assert router.metric("helios_router_retries_total", reason="stale_connection") == 1
    fake.fault("close", times=2)  # but a worker that does it again is not asked a third time
    answer = router.chat()
    assert (answer.status, answer.json()["error"]["code"]) == (502, "worker_lost")
    assert len(fake.journal()) == 5


@pytest.mark.parametrize("kind", ["reset", "close"])
def test_a_request_that_was_at_a_worker_is_not_sent_again(
    fake_vllm: Start, start_router: StartRouter, kind: str
) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    router = start_router(one, two)
    for fake in (one, two):
        fake.fault(kind)
    answer = router.chat()  # on a new connection: the worker may have begun, may even have died of it
    assert (answer.status, answer.json()["error"]["code"]) == (502, "worker_lost")
    assert len(one.journal()) + len(two.journal()) == 1


def test_garbage_from_a_worker_is_502(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake)
    fake.fault("garbage")
    answer = router.chat()
    assert (answer.status, answer.json()["error"]["code"]) == (502, "bad_worker_answer")
    assert router.chat().status == 200


@pytest.mark.parametrize("status", [400, 404, 429, 500, 502])
def test_errors_of_a_worker_are_passed_on_as_they_are(fake_vllm: Start, start_router: StartRouter, status: int) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    router = start_router(one, two)
    for fake in (one, two):
        fake.fault("status", status=status)
    answer = router.chat()
    assert (answer.status, answer.json()["error"]["message"]) == (status, "a fault was ordered")
    assert len(one.journal()) + len(two.journal()) == 1


def test_first_byte_deadline(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, first_byte_timeout_s=0.3)
    fake.fault("stall")
    began = time.monotonic()
    answer = router.chat()
    assert (answer.status, answer.json()["error"]["code"]) == (504, "first_byte_timeout")
    assert time.monotonic() - began >= 0.29
    wait_for(lambda: fake.journal()[-1]["ended_at"], what="the worker to see the end")
    fake.fault("stall", after_bytes=0)  # a head alone is no byte of the answer
    assert cut_stream(router, {**LONG, "stream": False}).endswith(b"\r\n\r\n")
    assert router.metric("helios_router_cut_answers_total", reason="first_byte_timeout") == 1
    assert router.in_flight() == 0


def test_a_slow_worker_may_take_its_time(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, first_byte_timeout_s=5, idle_timeout_s=0.2)
    fake.fault("slow", delay_s=0.6)
    assert router.chat().status == 200


def cut_stream(router: RouterProcess, body: Any = LONG) -> bytes:
    """Read a stream that is cut, at the level of bytes: everything up to the end of the connection."""
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    with socket.create_connection(router.address, timeout=20) as sock:
        sock.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        got = b""
        while piece := sock.recv(65536):
            got += piece
    return got


def test_idle_deadline_inside_a_stream(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    fake = fake_vllm("tiny", created=1)
    router = start_router(fake, idle_timeout_s=0.3)
    sock, answer = stream(router.address, "/v1/chat/completions", {**LONG, "max_tokens": 2})
    with sock, answer:
        first = len(answer.readline()) + 2
    fake.fault("stall", after_bytes=first - 1)  # the boundary after the first event
    got = cut_stream(router)
    assert b'"code":"idle_timeout"' in got
    assert not got.endswith(b"0\r\n\r\n")
    wait_for(lambda: fake.journal()[-1]["ended_at"], what="the worker to see the end")
    assert router.metric("helios_router_cut_answers_total", reason="idle_timeout") == 1


def test_a_worker_killed_inside_a_stream(
    killable: tuple[Control, subprocess.Popen[str]], fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    fake, process = killable
    router = start_router(fake, health_interval_s=0.1)
    results: list[bytes] = []
    reader = threading.Thread(target=lambda: results.append(cut_stream(router)))
    reader.start()
    wait_for(lambda: fake.journal() and fake.journal()[-1]["sent_bytes"] > 1000, what="the stream to run")
    process.kill()
    reader.join(10)
    (got,) = results
    assert got.count(b"data: ") > 3
    assert b'"code":"worker_lost"' in got
    assert not got.endswith(b"0\r\n\r\n")
    wait_for(lambda: router.up() == 0 and router.in_flight() == 0, what="the router to notice")
    assert router.chat().status == 503


def test_answers_with_a_length_are_cut_short_when_the_worker_breaks(
    fake_vllm: Start, start_router: StartRouter
) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake)
    fake.fault("reset", after_bytes=50)
    got = cut_stream(router, {**LONG, "stream": False})
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"content-length: " in head
    assert len(body) == 50


@pytest.mark.parametrize("when", ["before the head", "inside the stream", "inside a whole answer"])
def test_a_client_that_leaves_ends_the_work_at_once(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any, when: str
) -> None:
    fake = fake_vllm("tiny", token_s=0.01, prefill_s=30 if when == "before the head" else 0)
    router = start_router(fake)
    body = json.dumps({**LONG, "stream": when != "inside a whole answer"}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    with socket.create_connection(router.address) as sock:
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: fake.metric("vllm:num_requests_running") == 1, what="the request at the worker")
        if when == "inside the stream":
            assert sock.recv(100)
        assert router.in_flight() == 1
    wait_for(lambda: fake.metric("vllm:num_requests_running") == 0, timeout_s=2, what="the worker to stop")
    assert fake.journal()[-1]["outcome"] == "disconnected"
    assert fake.metric("vllm:request_success_total", finished_reason="abort") == 1
    wait_for(lambda: router.in_flight() == 0, what="the count to go back")
    assert router.metric("helios_router_client_disconnects_total") == 1


def test_a_client_that_takes_nothing_is_cut_off(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    fake = fake_vllm("tiny", max_model_len=200_000)
    router = start_router(fake, idle_timeout_s=0.5)
    body = json.dumps({**LONG, "max_tokens": 100_000}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(router.address)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: fake.metric("vllm:num_requests_running") == 1, what="the request at the worker")
        wait_for(lambda: fake.metric("vllm:num_requests_running") == 0, timeout_s=20, what="the worker to stop")
    wait_for(lambda: router.in_flight() == 0, what="the count to go back")
    assert fake.journal()[-1]["outcome"] == "disconnected"
    assert router.metric("helios_rss_anon_shmem_bytes") < 150 << 20


def test_a_body_that_stops_coming_is_given_up(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, idle_timeout_s=0.3)
    with socket.create_connection(router.address, timeout=10) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
        assert sock.recv(65536).startswith(b"HTTP/1.1 408")
    assert fake.journal() == []


def test_many_requests_leave_nothing_behind(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    router = start_router(one, two, args=("--policy", "least-requests"))
    for _ in range(20):
        router.chat()
    files = router.open_files()
    for number in range(500):
        assert router.chat(stream=number % 2 == 0).status == 200
    assert len(one.journal()) == len(two.journal()) == 260
    barrier = threading.Barrier(200)

    def one_of_many(number: int) -> int:
        barrier.wait(30)
        return router.chat(stream=number % 2 == 0, max_tokens=20).status

    with ThreadPoolExecutor(200) as pool:
        assert Counter(pool.map(one_of_many, range(200))) == {200: 200}
    assert router.in_flight() == 0
    assert router.metric("helios_router_requests_total", status="200") == 720
    assert one.metric("vllm:num_requests_running") == two.metric("vllm:num_requests_running") == 0
    assert len(one.journal()) + len(two.journal()) == 720  # of a burst, the worker that is faster gets more
    wait_for(lambda: router.open_files() <= files + 2, timeout_s=15, what="connections to be closed")


def test_a_name_under_which_a_worker_does_not_serve_is_named_in_the_log(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    fake = fake_vllm("tiny")
    router = start_router(f"wrong={fake.url}")
    wait_for(lambda: any("configured name" in m["message"] for m in router.messages()), what="the warning")
    (warning,) = [m for m in router.messages() if "configured name" in m["message"]]
    assert (warning["configured"], warning["serves"]) == (["wrong"], ["tiny"])


def test_worker_that_hangs_is_down_and_its_requests_go_elsewhere(
    killable: tuple[Control, subprocess.Popen[str]], fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    hanging, process = killable
    fake = fake_vllm("tiny")
    router = start_router(hanging, fake, health_interval_s=0.1, health_timeout_s=0.3)
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: router.up() == 1, what="the check to fail")
    for _ in range(5):
        assert router.chat().status == 200
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: router.up() == 2, what="the worker to be back")
