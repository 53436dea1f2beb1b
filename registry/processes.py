"""The other processes of a registry that share its metadata, over HTTP: found by the addresses in their rows."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from helios.errors import EntryNotFound, InvalidInput, Unavailable
from helios.http.client import HttpClient
from helios.http.clients import Clients
from registry.ingest import Source
from registry.member import Member
from registry.metadata import sharing
from registry.metadata.database import Database
from registry.receiver import Receiver
from registry.xet.tokens import Signer

MOST: Final = 16
"""Other processes whose connections are kept."""
TIMEOUT_S: Final = 20.0
SLOWEST: Final = 1e6
"""Bytes a second at which a body that is handed on must move at least."""
MAX_ANSWER: Final = 1 << 20
KEPT: Final = ("authorization", "content-type")
"""Headers that are handed on."""


class Processes:
    """Clients of the other processes. Threads may share it; close it at shutdown."""

    def __init__(self, database: Database, member: Member, signer: Signer) -> None:
        self._database, self._member, self.signer = database, member, signer
        self._clients = Clients(partial(HttpClient, timeout_s=TIMEOUT_S), MOST)

    def client(self, url: str) -> HttpClient:
        """The client for a process."""
        return self._clients.get(url)

    def close(self) -> None:
        self._clients.close()

    def named(self, what: str) -> str:
        """A name for something that only this process has, such as files on its disk."""
        return self._member.id + what

    def elsewhere(self, name: str) -> str | None:
        """The process that has what goes by a name of ``named``; None where it is this one, or nobody's name."""
        process = name[: len(self._member.id)]
        shared = self._database.kind.shared and len(name) > len(process)
        return process if shared and process != self._member.id else None

    async def hand_on(self, request: Request, process: str, receiver: Receiver) -> Response:
        """Have another process answer a request, whose body is streamed to it.

        Raises EntryNotFound where the process is gone, and with it what it had.
        """
        url = await asyncio.to_thread(self._url, process)
        length = request.headers.get("content-length", "")
        if not length.isascii() or not length.isdigit() or len(length) > 18:
            raise InvalidInput("an upload is sent with its Content-Length")
        headers = {name: request.headers[name] for name in KEPT if name in request.headers}
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        send = partial(self._send, url, request.method, path, headers | {"content-length": length}, int(length))
        return await receiver.receive(int(length), "the upload", request.stream(), send)

    def _url(self, process: str) -> str:
        with self._database.read(single=True) as connection:
            url = sharing.url_of(connection, process, self._database.kind.now)
        if url is None:
            raise EntryNotFound("the process of the registry that had this upload is gone: start it again")
        if not url:
            raise Unavailable("the process of the registry that has this upload can't be reached")
        return url

    def _send(self, url: str, method: str, path: str, headers: dict[str, str], size: int, body: Source) -> Response:
        source: Any = _Body(body, size)
        timeout_s = TIMEOUT_S + size / SLOWEST
        with self.client(url).request(method, path, headers=headers, body=source, timeout_s=timeout_s) as answer:
            content = answer.read(MAX_ANSWER)
        kept = {name: answer.headers[name] for name in ("content-type", "etag") if name in answer.headers}
        return Response(content, answer.status, kept)


class _Body:
    """A source as what http.client sends: it ends after exactly as many bytes as were announced."""

    def __init__(self, source: Source, size: int) -> None:
        self._source, self._left = source, size

    def read(self, count: int = -1, /) -> bytes:
        buffer = bytearray(min(self._left, count if count >= 0 else 1 << 18))
        if not buffer:
            self._source.readinto(memoryview(bytearray(1)))  # raises where the body was cut short
            return b""
        got = self._source.readinto(memoryview(buffer))
        self._left -= got
        return bytes(buffer[:got])
