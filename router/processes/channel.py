"""The two ends of a channel: a process's, in its event loop, and the supervisor's, which never waits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Final, cast

from router.processes.messages import AnyMessage, Frames, encode

log = logging.getLogger("helios.router")

BEHIND: Final = 64 << 20
"""A process that leaves so many bytes of its channel unread hangs."""
CLOSE_S: Final = 5.0
"""How long the supervisor may take to read what a process says last."""


class Channel(asyncio.Protocol):
    """A process's end. ``closed`` is called when the supervisor is gone."""

    def __init__(self, handle: Callable[[AnyMessage], None], closed: Callable[[], None]) -> None:
        self._handle, self._closed, self._frames = handle, closed, Frames()
        self._transport: asyncio.Transport | None = None
        self._lost = asyncio.Event()

    @classmethod
    async def over(
        cls, sock: socket.socket, handle: Callable[[AnyMessage], None], closed: Callable[[], None]
    ) -> Channel:
        """The channel over a connected socket, which it takes over."""
        _, channel = await asyncio.get_running_loop().create_connection(lambda: cls(handle, closed), sock=sock)
        return channel

    def send(self, message: AnyMessage) -> None:
        """Tell the supervisor, unless it is gone or reads nothing: what is told is renewed or asked for again."""
        transport = self._transport
        if transport is not None and not transport.is_closing() and transport.get_write_buffer_size() < BEHIND:
            transport.write(encode(message))

    async def close(self) -> None:
        """End it, after what was sent."""
        if self._transport is not None:
            self._transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._lost.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._handle(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost.set()
        self._closed()


class Line:
    """The supervisor's end of a process's channel."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._frames = Frames()
        self._out = bytearray()

    @property
    def waiting(self) -> bool:
        """Whether something is to be sent when the process has read more."""
        return bool(self._out)

    @property
    def hangs(self) -> bool:
        return len(self._out) > BEHIND

    def send(self, message: AnyMessage) -> None:
        self._out += encode(message)
        self.flush()

    def flush(self) -> None:
        """Send what can be sent now."""
        try:
            while self._out:
                del self._out[: self.sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # it has ended, which its pidfd says

    def receive(self) -> list[AnyMessage] | None:
        """The messages that came; None when there will be no more. Raises ValueError for what is no message."""
        found: list[AnyMessage] = []
        while True:
            try:
                data = self.sock.recv(1 << 18)
            except BlockingIOError:
                return found
            except OSError:
                data = b""
            if not data:
                return found or None
            found += self._frames.feed(data)
