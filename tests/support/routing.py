"""A real ``helios router`` process for tests, and a plain HTTP client that hides nothing."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from helios.home import Home
from tests.fakes.vllm.client import Control

CHAT = {"messages": [{"role": "user", "content": "hello there"}], "ignore_eos": True}


@dataclass
class Response:
    """A whole answer; ``headers`` in order, with lower-case names."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k == name), None)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class RouterProcess:
    """A running router. Its log is ``log``; lines at error level fail the test (``helios_home``)."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    tls: ssl.SSLContext | None = None
    """How its https is met."""

    @property
    def address(self) -> tuple[str, int]:
        return address_of(self.url)

    def connection(self, timeout_s: float = 30) -> http.client.HTTPConnection:
        """A new connection to it."""
        if self.tls is not None:
            return http.client.HTTPSConnection(*self.address, timeout=timeout_s, context=self.tls)
        return http.client.HTTPConnection(*self.address, timeout=timeout_s)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 30,
    ) -> Response:
        """One request on a connection of its own; ``body`` is bytes or becomes JSON."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {} if content is None else {"content-type": "application/json"}
        connection = self.connection(timeout_s)
        try:
            connection.request(method, path, content, {**kind, **(headers or {})})
            answer = connection.getresponse()
            found = [(name.lower(), value) for name, value in answer.getheaders()]
            return Response(answer.status, found, answer.read())
        finally:
            connection.close()

    def chat(self, model: str = "tiny", timeout_s: float = 30, **fields: Any) -> Response:
        body = {"model": model, "max_tokens": 4, **CHAT, **fields}
        return self.request("POST", "/v1/chat/completions", body, timeout_s=timeout_s)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.request("GET", "/metrics").body.decode().splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name and all(f'{k}="{v}"' in (found[2] or "") for k, v in labels.items()):
                total += float(found[3])
        return total

    def up(self) -> int:
        """Workers that are up."""
        return int(self.metric("helios_router_worker_up"))

    def in_flight(self) -> int:
        return int(self.metric("helios_router_in_flight"))

    def pids(self, role: str = "data") -> list[int]:
        """The router's processes of a role, ``data`` or ``control``."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(one) for one in children if _comm(one) == f"router {role}"]

    def open_files(self) -> int:
        """Descriptors of the data processes."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = 20) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(how)
        return self.process.wait(timeout_s)

    def messages(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def _comm(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def address_of(url: str) -> tuple[str, int]:
    """Host and port of a URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 0


def stream(
    address: tuple[str, int], path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[socket.socket, http.client.HTTPResponse]:
    """Begin a request and return its connection and answer, whose body is still to come. The caller closes both."""
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})})
    sock = connection.sock
    return sock, connection.getresponse()


def converse(address: tuple[str, int], data: bytes, timeout_s: float = 10) -> bytes:
    """Send bytes as they are, and return what comes until the other side closes."""
    got = b""
    with socket.create_connection(address, timeout=timeout_s) as sock:
        sock.sendall(data)
        while piece := sock.recv(65536):
            got += piece
    return got


@dataclass
class RouterStarter:
    """Starts routers with ``helios``, which has ``start(…, env=, stderr=)``; their logs lie in the home's."""

    helios: Any
    home: Home
    count: int = 0

    def __call__(
        self, *workers: Control | str, wait_up: bool = True, args: tuple[str, ...] = (),
        environ: Mapping[str, str] | None = None, **settings: float | str,
    ) -> RouterProcess:  # fmt: skip
        texts = [w if isinstance(w, str) else f"{w.model}={w.url}" for w in workers]
        self.home.logs.mkdir(parents=True, exist_ok=True)
        self.count += 1
        log = self.home.logs / f"router-{self.count}.log"
        env = {f"HELIOS_ROUTER__{name.upper()}": str(value) for name, value in settings.items()} | dict(environ or {})
        env.setdefault("HELIOS_ROUTER__HEALTH_INTERVAL_S", "0.2")
        env["HELIOS_LOG__FORMAT"] = "json"
        options = [option for text in texts for option in ("--worker", text)]
        with log.open("wb") as stderr:
            process = self.helios.start("router", "--port", "0", *options, *args, env=env, stderr=stderr.fileno())
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            pytest.fail(f"the router did not start:\n{log.read_text()}")
        router = RouterProcess(url, process, log)
        end = time.monotonic() + 10
        while wait_up and router.up() < len(texts):
            if time.monotonic() > end:
                pytest.fail(f"only {router.up()} of {len(texts)} workers came up:\n{log.read_text()}")
            time.sleep(0.02)
        return router


StartRouter = Callable[..., RouterProcess]


@pytest.fixture
def start_router(helios: Any, helios_home: Home) -> StartRouter:
    """``start_router(fake, …, idle_timeout_s=1)`` starts a router in front of fakes and waits until they are up."""
    return RouterStarter(helios, helios_home)
