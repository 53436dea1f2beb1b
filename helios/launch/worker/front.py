"""The front beside vLLM: probes, metrics and draining, over HTTP, on a port of its own and a unix socket.

Requests for the model don't come here: routers send them to vLLM itself. It runs in a thread of its own, so that a
probe is answered whatever the thread that looks after vLLM waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from types import TracebackType
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from helios.errors import HeliosError, Unavailable
from helios.http.client import HttpClient
from helios.http.server import Server, make_config
from helios.launch.worker.labels import Labels
from helios.launch.worker.life import State
from helios.launch.worker.looks import exposition
from helios.metrics import WorkerMetrics

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SCRAPE_S: Final = 5.0
"""Longest wait for vLLM's metrics, in seconds: Prometheus gives up after ten."""
SCRAPES: Final = 2
"""Scrapes at a time; others wait for those."""
CONNECTIONS: Final = 1024
KEEP_ALIVE_S: Final = 5
BEYOND_S: Final = 10.0
"""How much longer than the deadline for draining a caller waits, in seconds."""
START_S: Final = 30.0


class Board:
    """What the thread that looks after vLLM says (``state``), and what it is asked for."""

    def __init__(self) -> None:
        self.state = State(ready=False, live=True, why="vLLM is not ready: starting")
        self.engine_up = False
        self.drained: Callable[[], object] = lambda: None
        """Called once, when it has drained."""
        self._asked: str | None = None

    def say(self, state: State, engine_up: bool) -> None:
        """For the thread that looks after vLLM."""
        before, self.state, self.engine_up = self.state, state, engine_up
        if state.drained and not before.drained:
            self.drained()

    def ask_to_drain(self, why: str) -> None:
        """From now on it is not ready; the thread that looks after vLLM does the rest."""
        self._asked = self._asked or why

    @property
    def asked_to_drain(self) -> str | None:
        """Why it has to drain; None: it does not."""
        return self._asked

    @property
    def unready(self) -> str:
        """Why it takes no requests; empty: it does."""
        if self.state.ready and self._asked is None:
            return ""
        return self.state.why or f"draining: {self._asked}"


class _Quiet(Server):
    """Signals are the main thread's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Front:
    """A context that serves ``sockets``; leaving it closes them."""

    def __init__(
        self, board: Board, sockets: Sequence[socket.socket], metrics: WorkerMetrics, labels: Labels, engine: str,
        drain_s: float, remote_drain: bool,
    ) -> None:  # fmt: skip
        """``engine``: vLLM's URL; ``drain_s``: how long draining takes at most; ``remote_drain``: whether others than
        this machine's processes may ask for it."""
        self._board, self._sockets, self._metrics, self._labels = board, sockets, metrics, labels
        self._drain_s, self._remote_drain = drain_s, remote_drain
        self._client = HttpClient(engine, timeout_s=SCRAPE_S, max_idle=SCRAPES)
        self._scraping, self._drained = asyncio.Semaphore(SCRAPES), asyncio.Event()
        routes = [
            Route("/healthz", self._healthz, methods=["GET"]),
            Route("/readyz", self._readyz, methods=["GET"]),
            Route("/metrics", self._show_metrics, methods=["GET"]),
            Route("/drain", self._drain, methods=["GET", "POST"]),
        ]
        config = make_config(Starlette(routes=routes), grace_s=1)
        config.limit_concurrency = CONNECTIONS
        config.timeout_keep_alive = KEEP_ALIVE_S
        self._server = _Quiet(config)
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)

    def __enter__(self) -> Front:
        self._thread.start()
        _until(lambda: self._server.started or not self._thread.is_alive(), START_S)
        if not self._server.started:
            raise Unavailable("the front did not start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.stop()
        self._thread.join(START_S)
        self._client.close()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._board.drained = partial(loop.call_soon_threadsafe, self._drained.set)
        try:
            await self._server.serve(sockets=list(self._sockets))
        finally:
            self._board.drained = lambda: None

    async def _healthz(self, request: Request) -> Response:
        state = self._board.state
        return PlainTextResponse("ok\n" if state.live else f"{state.why}\n", 200 if state.live else 503)

    async def _readyz(self, request: Request) -> Response:
        why = self._board.unready
        return PlainTextResponse(f"{why}\n" if why else "ok\n", 503 if why else 200)

    async def _drain(self, request: Request) -> Response:
        """Answered when it has drained: what a preStop hook waits for."""
        if not (self._remote_drain or _is_here(request)):
            message = "only this machine's own processes may have it drain"
            hint = "Use `helios worker drain`, or set worker.remote_drain and keep others from this port."
            return JSONResponse({"error": {"code": "Forbidden", "message": message, "hint": hint}}, 403)
        self._board.ask_to_drain("a preStop hook, or `helios worker drain`")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s + BEYOND_S):
                await self._drained.wait()
        state = self._board.state
        answer = {"drained": state.drained, "cut": state.cut, "why": state.why}
        return JSONResponse(answer, 200 if state.drained else 504)

    async def _show_metrics(self, request: Request) -> Response:
        theirs = b""
        if self._board.engine_up:
            began = time.monotonic()
            try:
                async with asyncio.timeout(SCRAPE_S), self._scraping:
                    theirs = await asyncio.to_thread(self._scrape)
            except (HeliosError, TimeoutError):
                self._metrics.scrape_failures.inc()
            self._metrics.scrape_seconds.observe(time.monotonic() - began)
        self._metrics.engine_metrics.set(bool(theirs))
        return Response(self._labels.add(self._metrics.render()) + theirs, media_type=CONTENT_TYPE)

    def _scrape(self) -> bytes:
        """vLLM's metrics with the labels; raises HeliosError."""
        text = exposition(self._client).removesuffix(b"# EOF\n")
        return self._labels.add(text if text.endswith(b"\n") else text + b"\n")


def _is_here(request: Request) -> bool:
    """Whether the client is on this machine: at the unix socket, or at loopback."""
    if request.client is None or not request.client.host:
        return True
    try:
        address = ipaddress.ip_address(request.client.host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
