"""ZMQ sockets on an event loop, asyncio's or uvloop's: watched through their descriptors, read without waiting.

libzmq has an I/O thread of its own and needs no more of a loop. zmq.asyncio would add a future and a callback for every
message, and its own wake-ups, which can't be put off until it is KV events' turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import zmq

QUEUE: Final = 1000
"""Most messages in a socket's queue."""
MESSAGE_MAX: Final = 64 << 20
"""Longest message in bytes; libzmq drops the connection of who sends a longer one."""
HEARTBEAT_MS: Final = 5_000
"""libzmq asks a silent peer this often, and takes it for dead when nothing comes for three times as long."""


class Reader:
    """A socket that says when it can be read, by ``woken``. It is not watched again before it was read empty."""

    def __init__(self, sock: zmq.Socket[bytes], woken: Callable[[], None]) -> None:
        self._sock, self._woken = sock, woken
        self._fd = int(sock.FD)
        self._loop = asyncio.get_running_loop()
        self.readable = False
        self._loop.add_reader(self._fd, self.wake)

    def wake(self) -> None:
        if not self.readable:
            self.readable = True
            self._loop.remove_reader(self._fd)
        self._woken()

    def read(self) -> list[bytes] | None:
        """The frames of a message; None when there is none, and then the socket is watched."""
        import zmq

        try:
            return self._sock.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            self.readable = False
            self._loop.add_reader(self._fd, self.wake)
            self.pending()  # the descriptor tells of changes only: one may have been just before
            return None

    def pending(self) -> bool:
        """Whether there is a message, looked up now."""
        import zmq

        if not self.readable and int(self._sock.get(zmq.EVENTS)) & zmq.POLLIN:
            self.wake()
        return self.readable

    def close(self) -> None:
        if not self.readable:
            self._loop.remove_reader(self._fd)
        self._sock.close(linger=0)


def prepare(sock: zmq.Socket[bytes]) -> None:
    """Bounds, and heartbeats that find a dead peer."""
    import zmq

    sock.set(zmq.LINGER, 0)
    sock.set(zmq.RCVHWM, QUEUE)
    sock.set(zmq.SNDHWM, QUEUE)
    sock.set(zmq.MAXMSGSIZE, MESSAGE_MAX)
    sock.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.set(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
    sock.set(zmq.IPV6, 1)
