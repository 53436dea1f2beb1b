"""Reading a request's body: bounded, with a deadline, kept so that it can be sent again to another worker.

JSON bodies are kept in memory. Of a form, which carries a file, one MiB is; beyond that it goes into an unnamed
temporary file that vanishes with its last descriptor, whatever happens to the process. What all bodies together hold
in memory is bounded too.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Final

from starlette.types import Receive, Scope

from router import errors
from router.relay import headers
from router.relay.fields import model_of
from router.relay.form import FormScan
from router.routes import InferenceRoute

FORM_IN_MEMORY: Final = 1 << 20
"""A form longer than this, in bytes, goes to a file."""


class ClientGone(Exception):
    """The client closed its connection."""


class Budget:
    """Bytes of request bodies held in memory by all requests together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, count: int) -> None:
        """Count more bytes; raises ApiError (503) beyond the limit."""
        if self.used + count > self.limit:
            raise errors.overloaded(self.limit)
        self.used += count

    def give(self, count: int) -> None:
        self.used -= count


@dataclass(slots=True)
class Body:
    """A request's body, read whole; a context. ``forget`` gives its memory back early."""

    budget: Budget
    model: str | None = None
    content: bytes = b""
    file: BinaryIO | None = None
    _held: int = 0
    _sent: list[BinaryIO] = field(default_factory=list)

    def __enter__(self) -> Body:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def payload(self) -> bytes | BinaryIO:
        """What to send: bytes, or a file object of its own at the start of the spooled body."""
        if self.file is None:
            return self.content
        self.file.seek(0)
        payload = os.fdopen(os.dup(self.file.fileno()), "rb")
        self._sent.append(payload)
        return payload

    def forget(self) -> None:
        """Give the memory back: a worker answers, so the body won't be sent again."""
        self.budget.give(self._held)
        self._held = 0
        self.content = b""

    def release(self) -> None:
        """Give memory and files back."""
        self.forget()
        for file in (self.file, *self._sent):
            if file is not None:
                file.close()
        self.file = None
        self._sent.clear()

    def hold(self, count: int) -> None:
        self.budget.take(count)
        self._held += count


class Intake:
    """Reads bodies. ``limit`` is the longest body in bytes, ``idle_s`` the longest silence inside one."""

    def __init__(self, limit: int, idle_s: float, budget: Budget) -> None:
        self._limit, self._idle_s, self._budget = limit, idle_s, budget

    async def read(self, route: InferenceRoute, scope: Scope, receive: Receive) -> Body:
        """Read a route's body and find its model. Raises ApiError, or ClientGone."""
        encoding = headers.find(scope["headers"], b"content-encoding")
        if encoding is not None and encoding.strip().lower() != b"identity":
            raise errors.content_encoding(encoding.decode("latin-1")[:50])
        length = headers.find(scope["headers"], b"content-length")
        if length is not None and int(length) > self._limit:
            raise errors.too_large(self._limit)
        body = Body(self._budget)
        try:
            async with asyncio.timeout(self._idle_s) as deadline:
                pieces = _Pieces(receive, deadline, self._idle_s, self._limit)
                if route.body == "form":
                    await self._read_form(body, pieces, headers.find(scope["headers"], b"content-type") or b"")
                else:
                    await self._read_json(body, pieces)
        except TimeoutError:
            body.release()
            raise errors.body_timeout(self._idle_s) from None
        except BaseException:
            body.release()
            raise
        return body

    async def _read_json(self, body: Body, pieces: _Pieces) -> None:
        parts = []
        while piece := await pieces.next():
            body.hold(len(piece))
            parts.append(piece)
        body.content = parts[0] if len(parts) == 1 else b"".join(parts)
        body.model = model_of(body.content)

    async def _read_form(self, body: Body, pieces: _Pieces, content_type: bytes) -> None:
        scan = FormScan(content_type)
        buffer = bytearray()
        while piece := await pieces.next():
            scan.feed(piece)
            body.hold(len(piece))
            buffer += piece
            if len(buffer) > FORM_IN_MEMORY:
                await self._spool(body, buffer)
        body.model = scan.finish()
        if body.file is None:
            body.content = bytes(buffer)
        else:
            await self._spool(body, buffer)

    async def _spool(self, body: Body, buffer: bytearray) -> None:
        """Move the buffer to the body's file; disks are slow, so off the event loop."""
        try:
            if body.file is None:
                body.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (the body owns it)
            await _write_all(body.file, bytes(buffer))
        except OSError as error:
            raise errors.no_space() from error
        self._budget.give(len(buffer))
        body._held -= len(buffer)
        buffer.clear()


class _Pieces:
    """The body as it comes, at most ``limit`` bytes; each piece moves the deadline on."""

    def __init__(self, receive: Receive, deadline: asyncio.Timeout, idle_s: float, limit: int) -> None:
        self._receive, self._deadline, self._idle_s, self._left = receive, deadline, idle_s, limit
        self._limit = limit
        self._ended = False

    async def next(self) -> bytes:
        """The next piece; empty at the end. Raises ApiError beyond the limit, and ClientGone."""
        while not self._ended:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            self._ended = not message.get("more_body", False)
            piece: bytes = message.get("body", b"")
            self._left -= len(piece)
            if self._left < 0:
                raise errors.too_large(self._limit)
            if not self._ended:
                self._deadline.reschedule(asyncio.get_running_loop().time() + self._idle_s)
            if piece:
                return piece
        return b""


async def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write in a thread. A cancelled caller waits for it: the file must not be closed under a write."""
    writing = asyncio.ensure_future(asyncio.to_thread(_write, file, data))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        raise


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
