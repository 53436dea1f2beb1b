"""The mount's small HTTP server: /metrics, /healthz, /readyz and its status, on a unix socket and, if asked for, TCP.

HTTP/1.1 by h11 on trio's sockets; GET and HEAD only, one deadline a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import h11
import trio

log = logging.getLogger("heliosfs.http")

REQUEST_S: Final = 10.0
"""Time for a request to arrive and its answer to leave, and longest wait for the next one, in seconds."""

CONNECTIONS: Final = 64
"""Most connections at once; more are closed."""


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200


Pages = Mapping[str, Callable[[], Page]]
"""What makes the answer for each path."""


async def serve(listeners: list[trio.SocketListener], pages: Pages) -> None:
    """Serve until cancelled."""
    limit = trio.CapacityLimiter(CONNECTIONS)

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                limit.acquire_nowait()
            except trio.WouldBlock:
                return
            try:
                await _connection(stream, pages)
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError) as error:
                log.debug("a client left or did not speak HTTP", extra={"reason": str(error)})
            finally:
                limit.release()

    await trio.serve_listeners(handle, listeners)


async def _connection(stream: trio.SocketStream, pages: Pages) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16 << 10)
    while True:
        with trio.move_on_after(REQUEST_S) as deadline:
            request = await _next_request(stream, connection)
            if request is None:
                return
            await _answer(stream, connection, request, pages)
        if deadline.cancelled_caught or connection.our_state is not h11.DONE:
            return
        if connection.their_state is not h11.DONE:
            return  # a body nobody asked for
        connection.start_next_cycle()


async def _next_request(stream: trio.SocketStream, connection: h11.Connection) -> h11.Request | None:
    request = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(16 << 10))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif isinstance(event, (h11.ConnectionClosed, h11.Data)):
            return None


async def _answer(stream: trio.SocketStream, connection: h11.Connection, request: h11.Request, pages: Pages) -> None:
    path = request.target.decode("ascii", "replace").partition("?")[0]
    page = _page(request.method, path, pages)
    headers = [("content-type", page.content_type), ("content-length", str(len(page.body)))]
    data = connection.send(h11.Response(status_code=page.status, headers=headers)) or b""
    if request.method != b"HEAD":
        data += connection.send(h11.Data(data=page.body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)


def _page(method: bytes, path: str, pages: Pages) -> Page:
    if method not in (b"GET", b"HEAD"):
        return Page(b"only GET and HEAD\n", status=405)
    if path not in pages:
        return Page(f"there is {', '.join(pages)}\n".encode(), status=404)
    try:
        return pages[path]()
    except Exception:
        log.exception("a page failed", extra={"path": path})
        return Page(b"failed; the log says why\n", status=500)
