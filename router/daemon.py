"""The router's process: listens, serves, and ends cleanly."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing

from starlette.applications import Starlette

from helios.config import RouterSettings
from helios.http.server import Server, listen_tcp, make_server, url_of
from router.app import Router
from router.relay.protocol import RelayProtocol

Announce = Callable[[str, list[str]], None]


def run(settings: RouterSettings, announce: Announce) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    ``announce`` is called with the URL and the models once requests are answered. Raises UsageError for settings that
    can't work and Unavailable when the port is taken. On the first signal no more connections are accepted and answers
    in flight get ``drain_s`` seconds; on a second one they are cut at once.
    """
    with closing(listen_tcp(settings.host, settings.port)) as sock:
        url = url_of(sock, settings.host)

        @asynccontextmanager
        async def ready(_app: Starlette) -> AsyncIterator[None]:
            announce(url, router.workers.models)
            yield

        router = Router(settings, ready)
        server = make_server(
            router.app, http=RelayProtocol, loop="uvloop", grace_s=int(settings.drain_s) + 10, date_header=False,
            on_stop=router.drain.step,
        )  # fmt: skip
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(_serve(router, server, sock))
    return 130 if server.stopped_by == signal.SIGINT else 0


async def _serve(router: Router, server: Server, sock: socket.socket) -> None:
    async with router.running():
        await server.serve(sockets=[sock])
