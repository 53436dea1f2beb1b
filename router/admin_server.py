"""Serves the administration beside the router, in the same event loop.

The process that does so checks the workers, too: connections must not take the descriptors that it needs for that. So
many are served at each address; some more are answered with 503, and the others wait in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from helios.config import RouterSettings
from helios.errors import Unavailable
from helios.home import Home
from helios.http.server import listen_tcp, listen_unix, make_config
from router.admin_access import Access
from router.processes.accepting import Accepting
from router.relay.placed import Placed
from router.relay.places import Places

GRACE_S: Final = 1
"""Calls under way get so long when the router ends, in seconds."""
MOST: Final = 1024
"""Connections at each address: TCP's can't keep the router's own user from the unix socket. Workers that register may
keep theirs."""


class _Beside(Accepting):
    """A server of some sockets that leaves signals to the one that serves clients. ``most``: connections of each."""

    def __init__(self, app: ASGIApp, sockets: Sequence[socket.socket], most: int) -> None:
        listening = [([sock], Places(most)) for sock in sockets]
        super().__init__(make_config(app, grace_s=GRACE_S), listening, partial(Placed, refusing=_refuse))

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@contextlib.contextmanager
def listening(settings: RouterSettings, access: Access, port: int, home: Home) -> Iterator[list[socket.socket]]:
    """The sockets of the administration of a router at ``port``: a unix socket, and TCP if anybody may use that.

    Leaving the context closes them and removes the unix one. Raises Unavailable where a port or a path can't be used.
    """
    path = Path(settings.admin_socket) if settings.admin_socket else socket_path(home, port)
    with contextlib.ExitStack() as stack:
        try:
            sockets = [stack.enter_context(contextlib.closing(listen_unix(path)))]
        except OSError as error:
            raise Unavailable(f"the socket {path} can't be used: {error.strerror or error}") from None
        stack.callback(path.unlink, missing_ok=True)
        if access.over_tcp:
            tcp = listen_tcp(settings.admin_host, settings.admin_port, "router.admin_port")
            sockets.append(stack.enter_context(contextlib.closing(tcp)))
        yield sockets


def socket_path(home: Home, port: int) -> Path:
    """The unix socket of the administration of the router at this port."""
    return home.socket(f"router-{port}")


@asynccontextmanager
async def serving(app: ASGIApp, sockets: Sequence[socket.socket], most: int = MOST) -> AsyncIterator[None]:
    """Answer on these listening sockets while the context lasts, which closes them. ``most``: connections of each."""
    server = _Beside(app, sockets, most)
    task = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.stop()
        await task


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a connection for which there is no place."""
    message = "The administration has as many connections as it takes."
    error = {"code": "Unavailable", "message": message, "hint": "Close those that are not used, or try again."}
    headers = {"retry-after": "1", "connection": "close"}
    await JSONResponse({"error": error}, 503, headers)(scope, receive, send)
