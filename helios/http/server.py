"""Serve a Starlette application with uvicorn: the seam where protocols of ours go in (``make_config(http=…)``).

Files leave with sendfile(2), where the connection's protocol can do that (``helios.http.protocol``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from helios.errors import HeliosError, Unavailable
from helios.http.hosts import here
from helios.http.protocol import SENDFILE, Protocol
from helios.http.sendfile import BodyPart, file_move

log = logging.getLogger("helios.http")

SENDERS = 8
"""Threads that send files; each serves any number of clients in turns."""


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration, and what the connections of one server share."""

    @cached_property
    def senders(self) -> ThreadPoolExecutor:
        """The threads that send files."""
        return ThreadPoolExecutor(SENDERS, thread_name_prefix="sendfile")

    def close(self) -> None:
        """End the threads; nobody is being sent anything by now."""
        if "senders" in vars(self):
            self.senders.shutdown(wait=False)


class FileRangeResponse:
    """An ASGI response: ``count`` bytes of an open file from ``offset``, over sendfile where the server has it.

    Takes the file over and closes it. ``headers`` are lower-case names and values; ``sent`` counts the bytes that left.
    """

    def __init__(
        self, file: BinaryIO, offset: int, count: int, status: int, headers: Sequence[tuple[str, str]]
    ) -> None:
        self.file, self.offset, self.count, self.status = file, offset, count, status
        self.headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers]
        self.headers.append((b"content-length", str(count).encode()))
        self.sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.file:
            await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
            extension = scope.get("extensions", {}).get(SENDFILE)
            if scope["method"] != "HEAD" and self.count:
                if extension is None:
                    await self._copy(send)
                else:
                    self.sent = await extension["send"](file_move(self.file.fileno(), self.offset), self.count)
                    if self.sent < self.count:
                        return
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _copy(self, send: Send) -> None:
        left = self.count
        await asyncio.to_thread(self.file.seek, self.offset)
        while left:
            data = await asyncio.to_thread(self.file.read, min(left, 1 << 20))
            if not data:
                raise OSError("the file became shorter while it was sent")
            left -= len(data)
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self.sent += len(data)


@dataclass(frozen=True, slots=True)
class FilePart:
    """``count`` bytes of an open file from ``offset``."""

    file: BinaryIO
    offset: int
    count: int

    def move(self, sock: int, position: int, most: int) -> int:
        """Send with sendfile(2)."""
        return os.sendfile(sock, self.file.fileno(), self.offset + position, most)

    def read(self, position: int, most: int) -> bytes:
        return os.pread(self.file.fileno(), most, self.offset + position)


class FilePartsResponse:
    """An ASGI response whose body is parts, say of open files, ``count`` bytes in all, over sendfile if possible.

    ``parts`` may make its parts while earlier ones are sent (check them, for example). Its first part is awaited
    before the head goes out, so what it raises until then comes out of the call with nothing sent. After that an error
    breaks the connection: the client sees a body cut short. The iterator owns the files and is closed in every case.
    ``sent`` counts the bytes that left.
    """

    def __init__(
        self,
        parts: AsyncGenerator[BodyPart, None],
        count: int,
        status: int,
        headers: Sequence[tuple[str, str]],
    ) -> None:
        self.parts, self.count, self.status = parts, count, status
        self.sent = 0
        self.headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers]
        self.headers.append((b"content-length", str(count).encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self.parts) as parts:
            wanted = self.count if scope["method"] != "HEAD" else 0
            part = await anext(parts) if wanted else None
            await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
            extension = scope.get("extensions", {}).get(SENDFILE)
            try:
                while part is not None:
                    if extension is None:
                        await _copy(part, send)
                    elif (sent := await extension["send"](part.move, part.count)) < part.count:
                        self.sent += sent
                        return
                    self.sent += part.count
                    wanted -= part.count
                    part = await anext(parts) if wanted > 0 else None
            except HeliosError as error:
                log.warning("a body was cut short", extra={"path": scope["path"], "reason": error.message})
                if extension is None:
                    raise
                extension["abort"]()
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _copy(part: BodyPart, send: Send) -> None:
    done = 0
    while done < part.count:
        data = await asyncio.to_thread(part.read, done, min(part.count - done, 1 << 20))
        if not data:
            raise OSError("the file became shorter while it was sent")
        done += len(data)
        await send({"type": "http.response.body", "body": data, "more_body": True})


def listen_tcp(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises Unavailable naming the flag when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where it is told that the protocol is TCP: without, each answer takes 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise Unavailable(
            f"{host}:{port} can't be used: {error.strerror}",
            hint=f"Choose another with {flag}; {flag} 0 takes a free one.",
        ) from None
    sock.setblocking(False)
    return sock


def listen_unix(path: Path) -> socket.socket:
    """A listening unix socket that only its owner may use; a stale file is replaced."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    path.chmod(0o600)
    sock.listen(2048)
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket, host: str, scheme: str = "http") -> str:
    """The URL of a listening TCP socket."""
    return f"{scheme}://{here(host)}:{sock.getsockname()[1]}"


class Server(uvicorn.Server):
    """uvicorn's server with our signals: SIGTERM and SIGINT stop it cleanly, and the caller decides the exit code.

    ``stop`` asks it to end from inside; ``stopped_by`` is the signal that ended it, or None. With ``on_stop`` whoever
    serves long answers is told at each of these, in the event loop, and has to end them in time; without it a second
    signal ends the process without waiting for answers in flight.
    """

    stopped_by: signal.Signals | None = None

    config: ServerConfig

    def __init__(self, config: ServerConfig, on_stop: Callable[[], None] | None = None) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            self.config.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._on_signal, sig)
        try:
            yield
        finally:
            for sig in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(sig)

    def _on_signal(self, sig: signal.Signals) -> None:
        if self.should_exit and self._on_stop is None:
            self.force_exit = True
        self.stopped_by = self.stopped_by or sig
        self.stop()

    def stop(self) -> None:
        self.should_exit = True
        if self._on_stop is not None:
            self._on_stop()


def make_config(
    app: ASGIApp,
    *,
    http: Callable[..., asyncio.Protocol] = Protocol,
    loop: Literal["asyncio", "uvloop"] = "asyncio",
    grace_s: int = 10,
    date_header: bool = True,
    tls: ssl.SSLContext | None = None,
) -> ServerConfig:
    """What a server for ``app`` goes by.

    sendfile needs ``loop="asyncio"``: uvloop has none. At shutdown requests in flight get ``grace_s`` seconds. A relay
    passes on the ``Date`` of the answer it relays and takes ``date_header=False``. ``tls``: clients speak TLS.
    """
    return ServerConfig(
        app,
        http=cast(Any, http),  # uvicorn's type says a class; it only calls it
        loop=loop,
        ws="none",
        proxy_headers=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=date_header,
        timeout_graceful_shutdown=grace_s,
        timeout_keep_alive=75,
        ssl_context_factory=None if tls is None else lambda config, default: tls,
    )


def make_server(app: ASGIApp, *, grace_s: int = 10) -> Server:
    """A server for ``app``; run it with ``await server.serve(sockets=[…])``."""
    return Server(make_config(app, grace_s=grace_s))
