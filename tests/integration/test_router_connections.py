"""How many connections clients may have, and what a router does that has no file descriptor left."""

from __future__ import annotations

import json
import os
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from tests.conftest import HELIOS
from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.certificates import Authority
from tests.support.routing import CHAT, RouterProcess, RouterStarter, StartRouter, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
LONG = {"model": "tiny", "stream": True, **CHAT}
CHAT_PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
LIMIT = 160
"""Open files of a process: 64 are kept back, and each client takes two."""
ROOM = (LIMIT - 64) // 2


@dataclass
class Limited:
    """``helios`` in a shell that has lowered its limits of open files."""

    helios: Any
    soft: int
    hard: int

    def start(self, *args: str, env: Mapping[str, str], stderr: int) -> subprocess.Popen[str]:
        helios = self.helios
        begun: subprocess.Popen[str] = subprocess.Popen(
            ["prlimit", f"--nofile={self.soft}:{self.hard}", str(HELIOS), *args],
            env={**os.environ, **helios.environ, **env},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
        helios.started.append(begun)
        return begun


def asks(router: RouterProcess, path: str = CHAT_PATH, method: str = "POST", **fields: Any) -> HTTPConnection:
    """A connection of its own over which a request was sent."""
    connection = router.connection()
    body = json.dumps({"model": "tiny", "max_tokens": 4, **CHAT, **fields}).encode() if method == "POST" else None
    connection.request(method, path, body, JSON)
    return connection


def said(answer: HTTPResponse) -> tuple[int, str, str | None]:
    """The status of an error, its code and Retry-After."""
    return answer.status, json.loads(answer.read())["error"]["code"], answer.getheader("retry-after")


FULL = (503, "too_many_connections", "1")
OUT = (503, "router_overloaded", "1")


def down(router: RouterProcess) -> list[Any]:
    return [m for m in router.messages() if m["message"] in ("a worker is down", "a process ended and is replaced")]


# --- a limit ---------------------------------------------------------------------------------------------------------


def test_a_low_limit_of_open_files_turns_clients_away_and_harms_nobody_else(
    fake_vllm: Start, helios: Any, helios_home: Home, wait_for: Any
) -> None:
    one, two = fake_vllm("tiny", token_s=0.05), fake_vllm("tiny", token_s=0.05)
    router = RouterStarter(Limited(helios, 100, LIMIT), helios_home)(one, two)
    (pid,) = router.pids()
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (LIMIT, LIMIT)
    with ThreadPoolExecutor(ROOM + 30) as pool:

        def one_stream(number: int) -> tuple[int, str, str | None] | bytes:
            sock, answer = stream(router.address, CHAT_PATH, {**LONG, "max_tokens": 160})
            with sock, answer:
                return answer.read() if answer.status == 200 else said(answer)

        streams = [pool.submit(one_stream, number) for number in range(ROOM + 30)]
        wait_for(lambda: sum(one.done() for one in streams) >= 30, what="the others to be turned away")
        assert router.request("GET", "/healthz").status == router.request("GET", "/readyz").status == 200
        assert router.metric("helios_router_client_connections") == ROOM
        assert router.metric("helios_router_connections_turned_away_total") == 30
        assert router.up() == 2
        ends = [one.result() for one in streams]
    whole = [end for end in ends if isinstance(end, bytes)]
    assert [end for end in ends if not isinstance(end, bytes)] == [FULL] * 30
    assert len(whole) == ROOM
    assert all(end.endswith(b"data: [DONE]\n\n") for end in whole)
    wait_for(lambda: router.metric("helios_router_client_connections") == 1, what="nobody but who asks this")
    assert [router.chat().status for _ in range(8)] == [200] * 8
    assert (down(router), router.pids()) == ([], [pid])
    assert "connections are turned away" in [m["message"] for m in router.messages()]


def test_who_is_beyond_the_limit_is_told_in_its_own_dialect(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, max_connections=2)
    with ExitStack() as stack:
        held = [socket.create_connection(router.address) for _ in range(2)]  # taken in the order in which they came
        for sock in held:
            stack.callback(sock.close)
        for path in (CHAT_PATH, "/v1/files", "/v1/nonsense"):
            connection = asks(router, path)
            stack.callback(connection.close)
            answer = connection.getresponse()
            assert answer.getheader("connection") == "close"
            assert answer.getheader("x-request-id")
            assert said(answer) == FULL
        claude = asks(router, "/v1/messages")
        stack.callback(claude.close)
        assert json.loads(claude.getresponse().read())["error"]["type"] == "overloaded_error"
        models = asks(router, "/v1/models", "GET")
        stack.callback(models.close)
        assert said(models.getresponse()) == FULL
        with socket.create_connection(router.address, timeout=20) as sock:  # who goes on sending has its answer
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (2 << 20))
            for _ in range(32):
                sock.sendall(b"x" * 65536)
            assert sock.recv(65536).startswith(b"HTTP/1.1 503")
            assert sock.recv(1) == b""
        with socket.create_connection(router.address, timeout=20) as sock:  # who says nothing is not waited for
            assert _ends(sock)
        assert fake.journal() == []
        assert router.metric("helios_router_connections_turned_away_total") == 6
        held[0].close()
        wait_for(lambda: router.chat().status == 200, what="a place to be left")


def _ends(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_handshakes_have_places_too(fake_vllm: Start, start_router: StartRouter, tmp_path: Path, wait_for: Any) -> None:
    authority = Authority(tmp_path / "certificates")
    pair = authority.issue("router", "127.0.0.1")
    fake = fake_vllm("tiny")
    router = start_router(fake, wait_up=False, tls_cert=pair.cert, tls_key=pair.key, max_connections=2)
    router.tls = ssl.create_default_context(cafile=authority.path)
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(router.address)) for _ in range(2)]
        connection = asks(router)
        stack.callback(connection.close)
        assert said(connection.getresponse()) == FULL
        for sock in silent:
            sock.close()
        wait_for(lambda: router.up() == 1 and router.chat().status == 200, what="the places to be left")


@pytest.mark.parametrize(
    ("limit", "settings", "parts"),
    [
        (LIMIT, {"HELIOS_ROUTER__MAX_CONNECTIONS": "49"}, ["needs 162 open files", f"limit is {LIMIT}", "48 or less"]),
        (LIMIT, {"HELIOS_ROUTER__MAX_CONNECTIONS": "-1"}, ["must not be less than 0"]),
        (60, {}, ["60 open files are too few"]),
    ],
)
def test_more_connections_than_there_are_descriptors_exit_2(
    helios: Any, limit: int, settings: dict[str, str], parts: list[str]
) -> None:
    command = ["prlimit", f"--nofile={limit}:{limit}", str(HELIOS), "router", "--worker", "m=http://127.0.0.1:9"]
    env = {**os.environ, **helios.environ, **settings}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert all(part in done.stderr for part in parts), done.stderr


# --- no descriptor left ----------------------------------------------------------------------------------------------


def leave(pid: int, count: int) -> None:
    """Have a process's limit leave it so many descriptors more than it has."""
    used = {int(one) for one in os.listdir(f"/proc/{pid}/fd")}
    limit = free = 0
    while limit in used or free < count:
        free += limit not in used
        limit += 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, _HARD))


_HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_a_router_without_a_descriptor_goes_on_and_blames_nobody(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    one, two = fake_vllm("tiny", token_s=0.05), fake_vllm("tiny", token_s=0.05)
    router = start_router(one, two)
    (pid,) = router.pids()
    kept = router.connection()
    kept.request("GET", "/healthz")
    assert kept.getresponse().read()
    sock, answer = stream(router.address, CHAT_PATH, {**LONG, "max_tokens": 150})
    with sock, answer, ExitStack() as stack:
        stack.callback(kept.close)
        assert answer.readline()
        time.sleep(0.1)
        leave(pid, 0)
        for _ in range(10):  # more than breakers and health would stand
            kept.request("POST", CHAT_PATH, json.dumps({"model": "tiny", **CHAT}), JSON)
            assert said(kept.getresponse()) == OUT
        kept.request("GET", "/metrics")
        metrics = kept.getresponse().read().decode()
        assert f'helios_router_worker_up{{model="tiny",worker="{one.url}"}} 1.0' in metrics
        assert f'helios_router_worker_up{{model="tiny",worker="{two.url}"}} 1.0' in metrics
        assert "helios_router_breaker_state{" not in metrics or '"} 1.0' in metrics
        late = asks(router)  # waits in the kernel's queue
        stack.callback(late.close)
        wait_for(
            lambda: any(m["message"] == "no connection can be accepted" for m in router.messages()), what="the log"
        )
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (_HARD, _HARD))
        assert late.getresponse().status == 200
        assert answer.read().endswith(b"data: [DONE]\n\n")
    assert [router.chat().status for _ in range(4)] == [200] * 4
    for worker in (one, two):
        assert router.metric("helios_router_breaker_state", worker=worker.url) == 0
    assert (down(router), router.pids()) == ([], [pid])


def test_an_idle_connection_goes_where_there_is_no_descriptor_for_another(
    fake_vllm: Start, start_router: StartRouter
) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("other")
    router = start_router(one, two)
    (pid,) = router.pids()
    kept = router.connection()
    for model in ("tiny", "other", "tiny", "other"):  # each takes the place of the connection of the one before
        kept.request("POST", CHAT_PATH, json.dumps({"model": model, "max_tokens": 1, **CHAT}), JSON)
        answer = kept.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True)
        leave(pid, 0)
    kept.close()


def test_checks_without_a_descriptor_say_nothing_of_a_worker(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    router = start_router(fake_vllm("tiny"), health_interval_s=0.05)
    (pid,) = router.pids("control")

    def unchecked() -> bool:
        leave(pid, 0)  # again, since a check may have been under way
        told = [m["message"] for m in router.messages()]
        return told.count("a worker can't be checked: no file descriptor is left") > 5

    wait_for(unchecked, what="checks that can't be made")
    assert (router.up(), down(router)) == (1, [])
    assert router.chat().status == 200
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (_HARD, _HARD))
    assert router.pids("control") == [pid]
