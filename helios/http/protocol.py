"""uvicorn's httptools protocol with two additions, and bounds that uvicorn leaves open.

The ASGI extension ``helios.sendfile`` lets a response body leave with sendfile(2); ``helios.peer`` says who is at the
other end of a unix socket. Heads are bounded, in bytes and in time. The router's relay begins from here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from helios.http.sendfile import STALL_S, FileEnded, Move, drive

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application
    from uvicorn.server import ServerState

    from helios.http.server import ServerConfig

log = logging.getLogger("helios.http")

SENDFILE = "helios.sendfile"
PEER = "helios.peer"
CERTIFICATE = "helios.certificate"

MAX_HEAD = 256 << 10
"""A request's line and headers, trailers, or a chunk's extensions have fewer bytes."""

HEAD_S = 30.0
"""Longest time from a head's first byte to its last, in seconds."""

SILENT_S = 75.0
"""How long a new connection may say nothing, in seconds: clients of ours open some before they need them."""


TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\ncontent-length: 23\r\n"
    b"connection: close\r\n\r\nThe head is too long.\r\n"
)

_PEERCRED = struct.Struct("3i")
"""struct ucred: pid, uid, gid of the process that connected (unix(7), SO_PEERCRED)."""


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol plus the extensions ``helios.sendfile``, on a unix socket ``helios.peer``, and where a client
    has shown a certificate that was asked for ``helios.certificate``: what ``SSLObject.getpeercert`` says of it.

    ``_unseen`` counts bytes that the parser has taken and told nobody of: it keeps them, so there is a most.
    """

    config: ServerConfig
    # uvicorn's, which compiled code finds the faster for knowing of them.
    cycle: RequestResponseCycle
    flow: FlowControl
    loop: asyncio.AbstractEventLoop
    pipeline: deque[tuple[RequestResponseCycle, ASGI3Application]]
    server_state: ServerState
    timeout_keep_alive_task: asyncio.TimerHandle | None
    transport: asyncio.Transport

    peer: dict[str, int] | None = None
    certificate: dict[str, Any] | None = None
    _unseen = 0
    _in_head = True
    _overdue: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            # Never more than may stay unseen: a head that is too long doesn't pass because its end came along.
            part, data = data[: MAX_HEAD - self._unseen], data[MAX_HEAD - self._unseen :]
            self._unseen += len(part)
            self.parse(part)
            if self._unseen < MAX_HEAD or self.transport.is_closing():
                if self._in_head and self._unseen and (self._overdue is None or self._unseen == len(part)):
                    self._wait(HEAD_S)
                continue
            log.warning("a head is too long", extra={"client": self.client})
            self.refuse_head()

    def refuse_head(self) -> None:
        """End the connection, with a word if there is a place for one: not behind or amid another answer."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or self.pipeline:
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.write(TOO_LONG)
        self.transport.close()

    def parse(self, data: bytes) -> None:
        """Feed the parser."""
        super().data_received(data)

    def head_came(self) -> None:
        """A request's head is whole."""
        self._in_head, self._unseen = False, 0
        self._wait(None)

    def body_came(self) -> None:
        """A piece of a body is here."""
        self._unseen = 0

    def message_came(self) -> None:
        """A request is whole."""
        self._in_head, self._unseen = True, 0

    def on_headers_complete(self) -> None:
        self.head_came()
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers say nothing to anybody here
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self.body_came()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.message_came()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        super().connection_lost(exc)

    def _wait(self, seconds: float | None) -> None:
        """Close the connection after so long unless a head is here by then."""
        if self._overdue is not None:
            self._overdue.cancel()
        self._overdue = None if seconds is None else self.loop.call_later(seconds, self.transport.close)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(SILENT_S)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            pid, uid, gid = _PEERCRED.unpack(credentials)
            self.peer = {"pid": pid, "uid": uid, "gid": gid}
        self.certificate = transport.get_extra_info("peercert")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def send(move: Move, count: int) -> int:
            """Send ``count`` bytes with ``move`` as the rest of the body (Content-Length is sent).

            Returns how many were sent: fewer when the client has left or took nothing for too long.
            """
            sent = 0
            self.transport.set_write_buffer_limits(0)  # the head must have left: what follows goes past the transport
            with contextlib.suppress(TimeoutError):
                # Not wait_for: Python 3.11's loses a cancellation that comes as the wait ends.
                async with asyncio.timeout(STALL_S):
                    await self.flow.drain()
            if not (self.flow.write_paused or cycle.disconnected or self.transport.is_closing()):
                # A descriptor of our own: the transport may close its one while a thread is at work.
                sock = os.dup(self.transport.get_extra_info("socket").fileno())
                try:
                    sent = await drive(self.config.senders, sock, move, count)
                except FileEnded:
                    abort()
                    raise
                finally:
                    os.close(sock)
            self.transport.set_write_buffer_limits()
            cycle.expected_content_length -= sent
            if sent < count:
                abort()
            return sent

        def abort() -> None:
            """Break the connection, so that the client sees that the body it has got is not whole."""
            cycle.disconnected = True
            self.transport.abort()

        extensions: dict[str, Any] = cycle.scope.setdefault("extensions", {})
        if self.scheme == "http":
            extensions[SENDFILE] = {"send": send, "abort": abort}
        if self.peer is not None:
            extensions[PEER] = self.peer
        if self.certificate:
            extensions[CERTIFICATE] = self.certificate
        super()._start_asgi_task(cycle, app)
