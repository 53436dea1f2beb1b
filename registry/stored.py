"""Bytes of an object that is no local file, read from the store piece by piece while they are sent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from starlette.types import Receive, Scope, Send

from heliosfs.store.objects import ObjectStore
from registry.threads import Threads

PIECE: Final = 4 << 20
"""Bytes of one read. A request holds two: the one being sent, and the next."""


class StoredRangeResponse:
    """An ASGI response: ``count`` bytes of an object from ``offset``. ``sent`` counts the bytes that left.

    The first piece is read before the head goes out, so that an error until then is an answer of its own; a later one
    breaks the connection.
    """

    def __init__(
        self,
        threads: Threads,
        store: ObjectStore,
        key: str,
        offset: int,
        count: int,
        status: int,
        headers: Sequence[tuple[str, str]],
    ) -> None:
        self._threads, self._store, self._key, self.status = threads, store, key, status
        self._offset, self._count = offset, count
        self.headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers]
        self.headers.append((b"content-length", str(count).encode()))
        self.sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = 0 if scope["method"] == "HEAD" else self._count
        starts = range(self._offset, self._offset + left, PIECE)
        ahead = self._read(starts[0], left) if left else None
        try:
            data = await ahead if ahead is not None else b""
            await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
            for following in starts[1:]:
                ahead = self._read(following, self._offset + left - following)
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self.sent += len(data)
                data = await ahead
            await send({"type": "http.response.body", "body": data, "more_body": False})
            self.sent += len(data)
        finally:
            if ahead is not None and not ahead.done():
                ahead.add_done_callback(_forget)

    def _read(self, offset: int, left: int) -> asyncio.Future[bytes | memoryview]:
        def read() -> bytes | memoryview:
            buffer = memoryview(bytearray(min(PIECE, left)))
            self._store.read_into(self._key, offset, buffer)
            return buffer

        return asyncio.ensure_future(self._threads(read))


def _forget(future: asyncio.Future[bytes | memoryview]) -> None:
    """Nobody wants the piece any more, nor why it could not be read."""
    if not future.cancelled():
        future.exception()
