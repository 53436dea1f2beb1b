"""The mount's small HTTP server, on a unix socket and, for its pages only, on TCP.

HTTP/1.1 by h11 on trio's sockets. Bodies, connections and times are bounded; what is answered is in routing.py.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import h11
import trio

from helios.errors import DeadlineExceeded, InvalidInput, Unavailable
from helios.http.hosts import bracketed, split_listen
from heliosfs.routing import Page, Routes, error_page

log = logging.getLogger("heliosfs.http")

TRANSFER_S: Final = 10.0
"""Time for a request to arrive, or its answer to leave, and longest wait for the next one, in seconds."""

ANSWER_S: Final = 25.0
"""Time to find the answer, in seconds."""

CONNECTIONS: Final = 64
"""Most connections at once; more are closed."""

MAX_BODY: Final = 64 << 10
"""Longest body of a request, in bytes."""


@contextlib.contextmanager
def listen_here(path: Path) -> Iterator[trio.SocketListener]:
    """A unix socket at a path, for its owner alone; it goes with the block, an older one at once."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    try:
        path.chmod(0o600)
        sock.listen(64)
        yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    finally:
        path.unlink(missing_ok=True)


async def listen_on(address: str, setting: str) -> tuple[list[trio.SocketListener], str]:
    """Listen on ``host:port``, which a setting says; returns the URL, too. Raises UsageError, Unavailable."""
    host, port = split_listen(address, setting)
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise Unavailable(
            f"{address} can't be used: {error.strerror}", hint=f"Change {setting}; port 0 takes a free one."
        ) from None
    return listeners, f"http://{bracketed(host)}:{listeners[0].socket.getsockname()[1]}"


async def serve(listeners: list[trio.SocketListener], routes: Routes) -> None:
    """Serve until cancelled."""
    limit = trio.CapacityLimiter(CONNECTIONS)

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                limit.acquire_nowait()
            except trio.WouldBlock:
                return
            try:
                await _connection(stream, routes)
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError) as error:
                log.debug("a client left or did not speak HTTP", extra={"reason": str(error)})
            finally:
                limit.release()

    await trio.serve_listeners(handle, listeners)


async def _connection(stream: trio.SocketStream, routes: Routes) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16 << 10)
    while True:
        with trio.move_on_after(TRANSFER_S) as arrival:
            received = await _next_request(stream, connection)
        if arrival.cancelled_caught or received is None:
            return
        request, body = received
        page = await _page(request, body, routes)
        with trio.move_on_after(TRANSFER_S) as departure:
            await _send(stream, connection, request, page)
        if departure.cancelled_caught or connection.our_state is not h11.DONE:
            return
        connection.start_next_cycle()


async def _next_request(
    stream: trio.SocketStream, connection: h11.Connection
) -> tuple[h11.Request, bytes | None] | None:
    """A request and its body, which is None when it is too long; None when there is no further request."""
    request = None
    body: bytearray | None = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(16 << 10))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            if body is not None:  # the rest of a body too long is read and dropped, so that the client reads the answer
                body = body + event.data if len(body) + len(event.data) <= MAX_BODY else None
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, None if body is None else bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            return None


async def _page(request: h11.Request, body: bytes | None, routes: Routes) -> Page:
    if body is None:
        return error_page(InvalidInput(f"the body has more than {MAX_BODY} bytes"), status=413)
    page = error_page(DeadlineExceeded(f"there was no answer within {ANSWER_S:g} seconds"))
    with trio.move_on_after(ANSWER_S):
        page = await routes.answer(request.method.decode("ascii"), request.target.decode("ascii", "replace"), body)
    return page


async def _send(stream: trio.SocketStream, connection: h11.Connection, request: h11.Request, page: Page) -> None:
    headers = [("content-type", page.content_type), ("content-length", str(len(page.body))), *page.headers]
    data = connection.send(h11.Response(status_code=page.status, headers=headers)) or b""
    if request.method != b"HEAD":
        data += connection.send(h11.Data(data=page.body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)
