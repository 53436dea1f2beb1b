"""A daemon without an HTTP API of its own: /healthz, /readyz and /metrics, for the kubelet and for Prometheus."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator
from typing import Final, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from helios.http.server import Server, make_config
from helios.metrics import CONTENT_TYPE, Metrics

CONNECTIONS: Final = 64
"""Connections at a time; requests of more are answered 503."""
KEEP_ALIVE_S: Final = 30


class Health(Protocol):
    """What is told to whoever asks."""

    @property
    def unlive(self) -> str:
        """Why only a restart would help; empty: nothing is wrong."""
        ...

    @property
    def unready(self) -> str:
        """Why it is not to be used yet; empty: it is."""
        ...


class _Quiet(Server):
    """Signals are the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Front:
    """``serve`` answers until ``stop``."""

    def __init__(self, health: Health, metrics: Metrics) -> None:
        self._health, self._metrics = health, metrics
        routes = [
            Route("/healthz", self._healthz, methods=["GET"]),
            Route("/readyz", self._readyz, methods=["GET"]),
            Route("/metrics", self._show_metrics, methods=["GET"]),
        ]
        config = make_config(Starlette(routes=routes), grace_s=1)
        config.limit_concurrency, config.timeout_keep_alive = CONNECTIONS, KEEP_ALIVE_S
        self._server = _Quiet(config)

    async def serve(self, sock: socket.socket) -> None:
        await self._server.serve(sockets=[sock])

    def stop(self) -> None:
        self._server.stop()

    async def _healthz(self, request: Request) -> Response:
        return _said(self._health.unlive)

    async def _readyz(self, request: Request) -> Response:
        return _said(self._health.unready)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)


def _said(why: str) -> Response:
    return PlainTextResponse(f"{why}\n" if why else "ok\n", 503 if why else 200)
