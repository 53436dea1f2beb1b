"""``helios router`` as a command: its output, its exit codes, its settings, and how it ends."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import CHAT, RouterProcess, StartRouter, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
LONG: dict[str, Any] = {"model": "tiny", **CHAT, "max_tokens": 40, "stream": True}
WORKER = "m=http://127.0.0.1:9"


def test_it_prints_its_url_and_nothing_else(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake)
    assert router.url.startswith("http://127.0.0.1:")
    assert router.stop() == 0
    assert router.process.stdout is not None
    assert router.process.stdout.read() == ""


def test_json_output(helios: Any) -> None:
    process = helios.start("router", "--port", "0", "--worker", WORKER, "--worker", "a=http://127.0.0.1:9/x", "--json")
    assert process.stdout is not None
    document = json.loads(process.stdout.readline())
    assert document["models"] == ["a", "m"]
    assert document["url"].startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "no worker is configured"),
        (["--worker", "tiny"], "MODEL=http://HOST:PORT"),
        (["--worker", "=http://h:1"], "is not a worker"),
        (["--worker", "tiny=h:1"], "is not a worker's URL"),
        (["--worker", "tiny=ftp://h:1"], "is not a worker's URL"),
        (["--worker", "tiny=http://h:99999"], "is not a worker's URL"),
        (["--worker", "tiny=http://u:p@h:1"], "no query, fragment or credentials"),
        (["--worker", "tiny=http://h:1/v1"], "which the router adds itself"),
        (["--worker", "tiny=http://h:1,role=cook"], "'role=cook' is not an option"),
        (["--worker", "tiny=http://h:1,rule=decode"], "'rule=decode' is not an option"),
        (["--worker", "tiny=http://h:1,role=prefill"], "has role=prefill"),
        (["--worker", WORKER, "--worker", WORKER], "configured twice"),
        (["--worker", "a=http://h:1", "--worker", "b=http://h:1,role=decode"], "two roles"),
        (["--worker", WORKER, "--policy", "round-robbin"], "Did you mean 'round-robin'"),
        (["--worker", WORKER, "--policy", '{"scorers": ["speed"]}'], "queue-depth"),
        (["--worker", WORKER, "--policy", "{"], "not valid JSON"),
        (["--worker", WORKER, "--port", "65536"], "65536"),
        (["--worker", WORKER, "--config", "/no/such/file.toml"], "/no/such/file.toml can't be read"),
        (["--worker", WORKER, "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_exits_2_and_says_what(helios: Any, args: list[str], part: str) -> None:
    result = helios("router", *args, code=2)
    assert part in result.err
    assert result.out == ""


def test_settings_that_cannot_work_exit_2(helios: Any) -> None:
    result = helios("router", "--worker", WORKER, env={"HELIOS_ROUTER__IDLE_TIMEOUT_S": "0"}, code=2)
    assert "router.idle_timeout_s must be more than 0" in result.err


def test_busy_port_exits_1_and_names_the_flag(helios: Any) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        result = helios("router", "--worker", WORKER, "--port", str(port), code=1)
    assert f"127.0.0.1:{port} can't be used" in result.err
    assert "--port" in result.err


def test_workers_from_a_file_and_from_the_environment(
    fake_vllm: Start, start_router: StartRouter, tmp_path: Path
) -> None:
    fake = fake_vllm("org/tiny")
    file = tmp_path / "router.toml"
    file.write_text(
        f'[router]\nport = 1\n[[router.workers]]\nmodel = "org/tiny"\nurl = "{fake.url}"\n'
        f'[[router.workers]]\nmodel = "other"\nurl = "http://127.0.0.1:9"\nrole = "decode"\n'
    )
    router = start_router(args=("--config", str(file)))
    assert router.chat(model="org/tiny").status == 200
    models = router.request("GET", "/readyz").json()["models"]
    assert models["other"] == {"workers": 1, "up": 0}
    again = start_router(fake, args=("--config", str(file)))  # --worker replaces the file's workers
    assert list(again.request("GET", "/readyz").json()["models"]) == ["org/tiny"]


def test_health_and_readiness_with_no_worker_up(start_router: StartRouter) -> None:
    router = start_router(WORKER, wait_up=False)
    assert router.request("GET", "/healthz").json() == {"status": "ok"}
    ready = router.request("GET", "/readyz")
    assert (ready.status, ready.json()) == (200, {"status": "ready", "models": {"m": {"workers": 1, "up": 0}}})
    assert [card["id"] for card in router.request("GET", "/v1/models").json()["data"]] == ["m"]
    answer = router.chat(model="m")
    assert (answer.status, answer.json()["error"]["code"]) == (503, "no_healthy_worker")
    assert int(answer.header("retry-after") or 0) >= 1
    anthropic = router.request("POST", "/v1/messages", {"model": "m"})
    assert (anthropic.status, anthropic.json()["error"]["type"]) == (503, "overloaded_error")
    assert router.metric("helios_router_requests_total", model="m", status="503") == 2


def test_first_request_works_before_the_first_check(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny", prefill_s=0.2)
    router = start_router(fake, wait_up=False)
    assert router.chat().status == 200


def finish(router: RouterProcess, how: signal.Signals = signal.SIGTERM) -> tuple[threading.Thread, list[Any]]:
    """Stop the router in a thread; the list gets the exit code and how long it took."""
    result: list[Any] = []

    def stop() -> None:
        began = time.monotonic()
        result.append((router.stop(how), time.monotonic() - began))

    thread = threading.Thread(target=stop)
    thread.start()
    return thread, result


def test_sigterm_lets_a_stream_finish(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    fake = fake_vllm("tiny", token_s=0.03)
    router = start_router(fake)
    sock, answer = stream(router.address, "/v1/chat/completions", LONG)
    with sock, answer:
        got = answer.read(300)
        thread, result = finish(router)
        wait_for(lambda: refused(router), what="new connections to be refused")
        got += answer.read()
    thread.join()
    assert got.endswith(b"data: [DONE]\n\n")
    assert result[0][0] == 0
    assert fake.journal()[-1]["outcome"] == "finished"


def refused(router: RouterProcess) -> bool:
    try:
        socket.create_connection(router.address, timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_after_the_grace_a_stream_is_cut_with_the_reason(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny", token_s=0.05)
    router = start_router(fake, drain_s=0.5)
    sock, answer = stream(router.address, "/v1/chat/completions", {**LONG, "max_tokens": 900})
    with sock, answer:
        thread, result = finish(router)
        got = b""
        with pytest.raises(http.client.IncompleteRead) as cut:
            answer.read()
        got += cut.value.partial
    thread.join()
    assert b'"code":"router_shutdown"' in got
    assert result[0][0] == 0
    assert 0.4 < result[0][1] < 5
    assert fake.journal()[-1]["outcome"] == "disconnected"


def test_a_second_signal_cuts_at_once(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    fake = fake_vllm("tiny", token_s=0.05)
    router = start_router(fake, drain_s=60)
    sock, answer = stream(router.address, "/v1/chat/completions", {**LONG, "max_tokens": 900})
    with sock, answer:
        thread, result = finish(router, signal.SIGINT)
        wait_for(lambda: refused(router), what="the router to stop accepting")
        router.process.send_signal(signal.SIGINT)
        with pytest.raises(http.client.IncompleteRead) as cut:
            answer.read()
    thread.join()
    assert b'"code":"router_shutdown"' in cut.value.partial
    assert result[0][0] == 130
    assert result[0][1] < 10


def test_requests_waiting_for_their_first_byte_get_an_error_when_cut(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    fake = fake_vllm("tiny", prefill_s=30)
    router = start_router(fake, drain_s=0.3)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(router.chat()))
    asking.start()
    wait_for(lambda: fake.metric("vllm:num_requests_running") == 1, what="the request at the worker")
    assert router.stop() == 0
    asking.join()
    assert (answers[0].status, answers[0].json()["error"]["code"]) == (503, "router_shutdown")


def test_idle_connections_do_not_hold_up_the_end(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, drain_s=60)
    connection = http.client.HTTPConnection(*router.address)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    with socket.create_connection(router.address):  # one that never asks
        assert router.stop(timeout_s=10) == 0
    connection.close()
