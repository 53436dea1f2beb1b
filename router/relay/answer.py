"""Writing an answer to the client, and ending it so that the client notices when it can't be finished.

Nothing is held back: a piece from the worker goes to the socket before the next is awaited. When an answer breaks
off: before its head, the client gets a proper error; after it, a server-sent event stream that stands between two
events gets an error event in the route's dialect, and in every case the connection ends without the final chunk (or
short of Content-Length), which every HTTP client reports.
"""

from __future__ import annotations

import asyncio
import re

from starlette.types import Send

from router import errors
from router.errors import ApiError, Dialect
from router.relay import headers
from router.relay.headers import Headers
from router.relay.protocol import Cut

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_BOUNDARIES = (b"\n\n", b"\r\n\r\n")


class Answer:
    """One answer. ``status`` is None until its head is sent; ``writing`` is true while the client takes a piece."""

    __slots__ = ("_cut", "_dialect", "_events", "_send", "_tail", "finished", "request_id", "status", "writing")

    def __init__(self, send: Send, cut: Cut, dialect: Dialect, request_id: str) -> None:
        self._send, self._cut, self._dialect, self.request_id = send, cut, dialect, request_id
        self.status: int | None = None
        self.finished = False
        self.writing = False
        self._events = False
        self._tail = b"\n\n"

    async def start(self, status: int, raw: Headers) -> None:
        """Send the worker's status and headers. Raises ApiError for headers that can't be passed on."""
        if any(not _NAME.match(name) or _CONTROL.search(value) for name, value in raw):
            raise errors.bad_answer("a header holds control characters")
        kept = headers.to_client(raw, self.request_id)
        kind = headers.find(kept, b"content-type") or b""
        plain = headers.find(kept, b"content-encoding") is None and headers.find(kept, b"content-length") is None
        self._events = plain and kind.lower().startswith(b"text/event-stream")
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": kept})

    async def body(self, piece: bytes) -> None:
        """Send a piece of the body as it came."""
        if self._events:
            self._tail = piece[-4:] if len(piece) >= 4 else (self._tail + piece)[-4:]
        self.writing = True
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        self.writing = False

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        self.finished = True

    async def fail(self, error: ApiError) -> None:
        """End with an error: a whole answer if there is none yet, else break off."""
        if self.status is None:
            await self._error(error)
            return
        if self.writing:
            self._cut.abort()
            return
        if self._events and self._tail.endswith(_BOUNDARIES):
            event = self._dialect.event(error, self.request_id)
            # Bounded, because a client that takes nothing would hold up the end of its own request.
            try:
                async with asyncio.timeout(1.0):
                    await self._send({"type": "http.response.body", "body": event, "more_body": True})
            except TimeoutError:
                self._cut.abort()
                return
        self._cut.close()

    def abandon(self) -> None:
        """The client takes nothing: end without another word."""
        self._cut.abort()

    async def _error(self, error: ApiError) -> None:
        content = self._dialect.body(error, self.request_id)
        raw = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"x-request-id", self.request_id.encode()),
        ]
        if error.retry_after_s is not None:
            raw.append((b"retry-after", str(error.retry_after_s).encode()))
        if error.allow is not None:
            raw.append((b"allow", error.allow.encode()))
        self.status = error.status
        await self._send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": content, "more_body": False})
        self.finished = True
