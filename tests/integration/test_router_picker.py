"""A real Envoy asks the picker where requests go, with the documented configuration, in front of fake vLLMs."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.gateway import asks, documented, follows, gateway, hints, lists_workers, picker_of
from tests.support.routing import RouterProcess, StartRouter, start_router, stream
from tests.support.wake_hook import Hook, hook

__all__ = ["allowed_violations", "fake_vllm", "hook", "start_router"]
Start = Callable[..., Control]
PICKER = ("--picker", "127.0.0.1:0")
CHAT = "/v1/chat/completions"
DESTINATION = "x-gateway-destination-endpoint"


@pytest.fixture
def envoy(tmp_path: Path) -> Iterator[Callable[..., RouterProcess]]:
    """``envoy(router)`` starts one that asks the router's picker; ``config`` is the documented one otherwise."""
    with ExitStack() as stack:

        def start(router: RouterProcess, config: dict[str, Any] | None = None) -> RouterProcess:
            whole = documented()[0] if config is None else config
            return stack.enter_context(gateway(picker_of(router), whole, tmp_path / "envoy"))

        yield start


def asked(fakes: list[Control]) -> list[int]:
    return [len(fake.journal()) for fake in fakes]


def chat(via: RouterProcess, text: str, **fields: Any) -> Any:
    body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": text}], **fields}
    return via.request("POST", CHAT, body)


def test_requests_go_where_the_routers_own_policy_says(fake_vllm: Start, start_router: StartRouter, envoy: Any) -> None:
    fakes = [fake_vllm("tiny", gateway=True) for _ in range(3)]
    policy = json.dumps({"name": "prefix-affinity", "prefix_chars": 300})
    router = start_router(*fakes, args=(*PICKER, "--policy", policy))
    front = envoy(router)
    start = "tell me a long story about a router " * 10
    for number in range(3):
        assert chat(router, f"{start} {number}").status == 200
        answer = chat(front, f"{start} {number} again", stream=True)
        assert (answer.status, answer.body.endswith(b"data: [DONE]\n\n")) == (200, True)
    assert sorted(asked(fakes)) == [0, 0, 6]
    assert front.request("GET", "/v1/models").json() == router.request("GET", "/v1/models").json()
    assert router.metric("helios_router_picks_total", result="picked") == 3


def test_what_a_client_says_of_where_it_goes_does_not_count(
    fake_vllm: Start, start_router: StartRouter, envoy: Any, tmp_path: Path
) -> None:
    fake, other = fake_vllm("tiny", gateway=True), fake_vllm("secret")
    router = start_router(fake, args=PICKER)
    config = documented()[0]
    del config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0]
    front = envoy(router, config)  # not even where the gateway lets it through
    body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
    headers = {DESTINATION: other.url.partition("//")[2]}
    assert front.request("POST", CHAT, body, headers).status == 200
    assert asked([fake, other]) == [1, 0]


def test_errors_are_the_routers_own(fake_vllm: Start, start_router: StartRouter, envoy: Any, wait_for: Any) -> None:
    fake = fake_vllm("tiny", gateway=True)
    router = start_router(fake, args=PICKER, max_body_mib=1)
    front = envoy(router)
    big = {"model": "tiny", "messages": [{"role": "user", "content": "x" * (1 << 20)}]}
    cases: list[tuple[str, str, Any, int]] = [
        ("POST", CHAT, b"{", 400),
        ("POST", CHAT, b"", 400),
        ("POST", CHAT, {"messages": []}, 404),
        ("POST", CHAT, {"model": "none"}, 404),
        ("POST", CHAT, {"model": "tiny", "kv_transfer_params": {}}, 400),
        ("POST", CHAT, big, 413),
        ("POST", "/v1/messages", {"model": "none"}, 404),
        ("POST", "/sleep", {}, 404),
        ("GET", CHAT, None, 405),
        ("GET", "/health", None, 404),
        ("GET", "/v1/models/none", None, 404),
    ]
    for method, path, body, status in cases:
        known = {"x-request-id": "one"}
        ours, theirs = (via.request(method, path, body, known) for via in (router, front))
        assert (theirs.status, theirs.body) == (status, ours.body), (method, path)
        for name in ("content-type", "retry-after", "allow"):
            assert theirs.header(name) == ours.header(name), (method, path, name)
    assert fake.journal() == []
    fake.refuse()
    wait_for(lambda: router.up() == 0, what="the worker to be down")
    answer = chat(front, "hello")
    assert answer.status == 503
    assert answer.json()["error"]["code"] == "no_healthy_worker"
    assert answer.header("retry-after") == "1"


def test_bodies_of_any_length_come_as_they_were_sent(fake_vllm: Start, start_router: StartRouter, envoy: Any) -> None:
    fake = fake_vllm("tiny", gateway=True, max_model_len=4_000_000)
    router = start_router(fake, args=PICKER)
    front = envoy(router)
    connection = http.client.HTTPConnection(*front.address, timeout=30)
    for size in (0, 61_900, 62_000, 62_100, 2_000_000):
        body = json.dumps({"model": "tiny", "max_tokens": 1, "prompt": "x" * size}).encode()
        pieces = [body[:7], body[7:8], body[8:]]
        connection.request("POST", "/v1/completions", iter(pieces), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, answer.read() != b"") == (200, True), size
        assert fake.journal()[-1]["body_sha256"] == sha256(body).hexdigest(), size
    connection.close()


def test_an_alias_changes_the_body_and_its_length(fake_vllm: Start, start_router: StartRouter, envoy: Any) -> None:
    fake = fake_vllm("tiny", gateway=True)
    router = start_router(fake, args=PICKER, aliases=json.dumps({"the-model-that-is-used": "tiny"}))
    front = envoy(router)
    body = b'{"model": "%b", "max_tokens": 1, "prompt": "hello"}'
    answer = front.request("POST", "/v1/completions", body % b"the-model-that-is-used")
    assert (answer.status, answer.json()["model"]) == (200, "tiny")
    assert fake.journal()[-1]["body_sha256"] == sha256(body % b"tiny").hexdigest()


def test_only_what_the_gateway_allows_is_chosen(fake_vllm: Start, start_router: StartRouter, tmp_path: Path) -> None:
    fakes = [fake_vllm("tiny", gateway=True) for _ in range(3)]
    router = start_router(*fakes, args=(*PICKER, "--policy", "round-robin"))
    places = [fake.url.partition("//")[2] for fake in fakes]
    for number, (allowed, expected) in enumerate(
        [(places[:2], [3, 3, 0]), ((*places[2:], "10.0.0.1:1"), [0, 0, 6]), (("10.0.0.1:1",), None), ((), None)]
    ):
        config = documented()[0]
        hints(config, *allowed)
        for fake in fakes:
            fake.forget()
        with gateway(picker_of(router), config, tmp_path / f"envoy-{number}") as front:
            answers = [chat(front, f"{n}") for n in range(6)]
        if expected is not None:
            assert asked(fakes) == expected
        else:
            assert {(a.status, a.json()["error"]["code"]) for a in answers} == {(503, "no_healthy_worker")}
            assert asked(fakes) == [0, 0, 0]


def test_a_gateway_tries_the_next_one_and_says_so(fake_vllm: Start, start_router: StartRouter, envoy: Any) -> None:
    fakes = [fake_vllm("tiny", gateway=True) for _ in range(3)]
    settings = json.dumps({"listen": "127.0.0.1:0", "endpoints": 3, "response": "follow"})
    router = start_router(*fakes, picker=settings, health_interval_s=30, args=("--policy", "round-robin"))
    config = documented()[0]
    lists_workers(config, *fakes)
    follows(config, response_header_mode="SEND")
    front = envoy(router, config)
    fakes[0].refuse()  # which the router finds out much later
    assert [chat(front, f"{n}").status for n in range(6)] == [200] * 6
    assert asked(fakes)[0] == 0
    assert router.in_flight() == 0


@pytest.mark.parametrize("response", ["leave", "follow"])
def test_what_is_in_flight_is_known(
    fake_vllm: Start, start_router: StartRouter, envoy: Any, wait_for: Any, response: str
) -> None:
    fakes = [fake_vllm("tiny", gateway=True, token_s=0.05, load_tracking=True) for _ in range(2)]
    settings = json.dumps({"listen": "127.0.0.1:0", "response": response})
    router = start_router(
        *fakes, picker=settings, scrape_interval_s=0.2, processes=2, args=("--policy", "least-requests")
    )
    config = documented()[0]
    if response == "follow":
        follows(config)
    front = envoy(router, config)
    streams = []
    for number in range(6):
        # Six seconds each: the first has to be under way still when the last has begun.
        body = {"model": "tiny", "max_tokens": 120, "stream": True, "ignore_eos": True, "prompt": f"{number}"}
        streams.append(stream(front.address, "/v1/completions", body))
    assert (asked(fakes), router.in_flight()) == ([3, 3], 6)
    for sock, answer in streams:
        assert answer.read().endswith(b"data: [DONE]\n\n")
        sock.close()
    wait_for(lambda: router.in_flight() == 0, what="nothing to be in flight")


@pytest.mark.parametrize("response", ["leave", "follow"])
def test_a_gateway_that_would_send_every_piece_of_the_answer(
    fake_vllm: Start, start_router: StartRouter, envoy: Any, response: str
) -> None:
    """As Istio's do: it is left, or gets each piece back."""
    fake = fake_vllm("tiny", gateway=True, token_s=0.01)
    router = start_router(fake, picker=json.dumps({"listen": "127.0.0.1:0", "response": response}))
    config = documented()[0]
    follows(config, response_header_mode="SEND", response_body_mode="FULL_DUPLEX_STREAMED")
    front = envoy(router, config)
    body = {"model": "tiny", "max_tokens": 20, "stream": True, "ignore_eos": True, "prompt": "hello", "seed": 1}
    direct, through = (via.request("POST", "/v1/completions", body) for via in (router, front))
    texts = [[json.loads(line[6:])["choices"][0]["text"] for line in answer.body.splitlines()
              if line.startswith(b"data: {")] for answer in (direct, through)]  # fmt: skip
    assert len(texts[0]) >= 20
    assert texts[0] == texts[1]
    assert chat(front, "whole").status == 200


def test_a_request_waits_for_a_worker_and_is_shed(
    fake_vllm: Start, start_router: StartRouter, envoy: Any, wait_for: Any
) -> None:
    fake = fake_vllm("tiny", gateway=True, token_s=0.05)
    queue = {"queue": {"per_worker": 1, "max_requests": 1, "saturated_s": 20}}
    settings = json.dumps({"listen": "127.0.0.1:0", "response": "follow"})
    router = start_router(fake, picker=settings, admission=json.dumps(queue))
    config = documented()[0]
    follows(config)
    front = envoy(router, config)
    body = {"model": "tiny", "max_tokens": 40, "stream": True, "ignore_eos": True, "prompt": "hello"}
    sock, first = stream(front.address, "/v1/completions", body)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(chat(front, "second")))
    waiting.start()
    wait_for(lambda: router.metric("helios_router_queued", model="tiny") == 1, what="the second to wait")
    shed = chat(front, "third")
    assert (shed.status, shed.json()["error"]["code"]) == (429, "queue_full")
    assert int(shed.header("retry-after") or 0) > 0
    assert answers == []
    assert first.read().endswith(b"data: [DONE]\n\n")
    waiting.join(30)
    assert [answer.status for answer in answers] == [200]
    sock.close()


def test_a_client_that_leaves_the_queue_is_gone(
    fake_vllm: Start, start_router: StartRouter, envoy: Any, wait_for: Any
) -> None:
    fake = fake_vllm("tiny", gateway=True, token_s=0.05)
    settings = json.dumps({"listen": "127.0.0.1:0", "response": "follow"})
    router = start_router(fake, picker=settings, admission=json.dumps({"queue": {"per_worker": 1}}))
    config = documented()[0]
    follows(config)
    front = envoy(router, config)
    body = {"model": "tiny", "max_tokens": 100, "stream": True, "ignore_eos": True, "prompt": "hello"}
    sock, first = stream(front.address, "/v1/completions", body)
    connection = http.client.HTTPConnection(*front.address, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    wait_for(lambda: router.metric("helios_router_queued", model="tiny") == 1, what="the second to wait")
    connection.close()
    wait_for(lambda: router.metric("helios_router_queued", model="tiny") == 0, what="it to be gone")
    assert router.in_flight() == 1
    first.close()
    sock.close()
    wait_for(lambda: router.in_flight() == 0, what="the first to be gone, too")


def test_a_request_for_a_model_that_sleeps_is_held_while_it_wakes(
    fake_vllm: Start, start_router: StartRouter, envoy: Any, wait_for: Any, hook: Hook
) -> None:
    """A stream, too, which hears nothing meanwhile; and so again after it went to sleep."""
    fake = fake_vllm("tiny", gateway=True)
    router = start_router(fake, args=PICKER, admission=json.dumps({"wake_url": hook.url}))
    front = envoy(router)
    for _ in range(2):
        hook.documents.clear()
        fake.refuse()
        wait_for(lambda: router.up() == 0, what="the worker to be down")
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda into=answers: into.append(chat(front, "hello", stream=True)))
        waiting.start()
        wait_for(lambda: hook.asked == ["tiny"], what="it to be woken")
        fake.accept()
        waiting.join(30)
        assert [(answer.status, answer.body[:6]) for answer in answers] == [(200, b"data: ")]


def kill(router: RouterProcess) -> None:
    """All of it, at once."""
    for pid in [router.process.pid, *router.pids(), *router.pids("control")]:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("response", ["leave", "follow"])
def test_the_picker_dies_with_requests_in_flight(
    fake_vllm: Start, start_router: StartRouter, envoy: Any, wait_for: Any, response: str
) -> None:
    """Whoever has his answer begun keeps it where the gateway was left; nobody hangs."""
    fake = fake_vllm("tiny", gateway=True, token_s=0.05)
    settings = json.dumps({"listen": "127.0.0.1:0", "response": response})
    queue = json.dumps({"queue": {"per_worker": 1}})
    router = start_router(fake, picker=settings, admission=queue)
    config = documented()[0]
    if response == "follow":
        follows(config)
    front = envoy(router, config)
    body = {"model": "tiny", "max_tokens": 40, "stream": True, "ignore_eos": True, "prompt": "hello"}
    sock, begun = stream(front.address, "/v1/completions", body)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(chat(front, "second")))
    waiting.start()
    wait_for(lambda: router.metric("helios_router_queued", model="tiny") == 1, what="the second to wait")
    kill(router)
    if response == "leave":
        assert begun.read().endswith(b"data: [DONE]\n\n")
    else:
        with pytest.raises(http.client.IncompleteRead):
            begun.read()
    sock.close()
    waiting.join(30)
    assert [answer.status for answer in answers] == [500]
    assert chat(front, "later").status == 500


def test_a_gateway_that_may_goes_on_without_the_picker(
    fake_vllm: Start, start_router: StartRouter, envoy: Any, wait_for: Any
) -> None:
    """Once it knows that the picker is gone: Envoy has no body to send any more where it had begun to ask."""
    fakes = [fake_vllm("tiny", gateway=True) for _ in range(2)]
    router = start_router(*fakes, args=PICKER)
    config = documented()[0]
    lists_workers(config, *fakes)
    asks(config)["failure_mode_allow"] = True
    front = envoy(router, config)
    assert chat(front, "hello").status == 200
    kill(router)
    alone = [200] * 6
    wait_for(lambda: [chat(front, f"{n}").status for n in range(6)] == alone, what="the gateway to go on alone")
    assert all(len(fake.journal()) >= 3 for fake in fakes)


def test_it_ends_in_order_and_another_takes_over(
    fake_vllm: Start, start_router: StartRouter, envoy: Any, wait_for: Any
) -> None:
    """SIGHUP replaces the processes under a gateway that follows: nothing is cut, and new requests are answered."""
    fake = fake_vllm("tiny", gateway=True, token_s=0.05)
    settings = json.dumps({"listen": "127.0.0.1:0", "response": "follow"})
    router = start_router(fake, picker=settings, drain_s=0.5)
    config = documented()[0]
    follows(config)
    front = envoy(router, config)
    (before,) = router.pids()
    body = {"model": "tiny", "max_tokens": 60, "stream": True, "ignore_eos": True, "prompt": "hello"}
    sock, begun = stream(front.address, "/v1/completions", body)
    router.process.send_signal(signal.SIGHUP)
    wait_for(lambda: before not in router.pids() and router.up() == 1, what="another process")
    assert begun.read().endswith(b"data: [DONE]\n\n")  # it was left in order
    sock.close()
    assert chat(front, "again").status == 200
    assert router.stop() == 0
