"""sendfile(2) for asyncio, without holding the event loop up.

asyncio's own ``loop.sendfile`` calls sendfile on the loop: a page that has to come from the disk stops everybody. Here
the calls run in a few threads, a turn at a time. A turn moves at most ``TURN_BYTES`` or lasts ``TURN_S``, so that many
clients share the threads fairly; a client that takes nothing holds no thread, the loop waits for it.
"""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, Protocol

TURN_BYTES: Final = 16 << 20
TURN_S: Final = 0.1
PATIENCE_MS: Final = 10
"""How long a thread waits for room in the socket: a client that reads takes microseconds."""

STALL_S: Final = 120.0
"""A client that takes nothing for this long is cut off, in seconds."""


Move = Callable[[int, int, int], int]
"""Sends to a socket (a descriptor) what is to be sent from a position on, but not more than so many bytes.

Returns how many went; raises BlockingIOError when the socket has no room. Returns 0 or raises FileEnded when there is
nothing at the position."""


class BodyPart(Protocol):
    """Some bytes of a body that are made, or read, while they are sent, in threads."""

    @property
    def count(self) -> int:
        """How many bytes."""

    def move(self, sock: int, position: int, most: int) -> int:
        """A ``Move``."""

    def read(self, position: int, most: int) -> bytes:
        """At most ``most`` bytes, at least one, from a position on; none only where there are none."""


class FileEnded(OSError):
    """The file is shorter than what was to be sent."""


async def send(executor: Executor, sock: int, file: int, offset: int, count: int) -> int:
    """Send ``count`` bytes of a file from ``offset`` to a non-blocking socket, both given as descriptors.

    Both must stay open until this returns, and nobody else may write to the socket. Returns how many bytes went:
    fewer when the client has gone or stalled. Raises FileEnded, or OSError when the file can't be read.
    """
    return await drive(executor, sock, file_move(file, offset), count)


def file_move(file: int, offset: int) -> Move:
    """Sends bytes of a file (a descriptor) from ``offset`` on."""
    return lambda sock, position, most: os.sendfile(sock, file, offset + position, most)


async def drive(executor: Executor, sock: int, move: Move, count: int) -> int:
    """Send ``count`` bytes with ``move``, which is called in the executor's threads; otherwise like ``send``."""
    loop = asyncio.get_running_loop()
    sent = 0
    while sent < count:
        turn = loop.run_in_executor(executor, _turn, sock, move, sent, count - sent)
        try:
            moved = await asyncio.shield(turn)
        except ConnectionError:
            return sent
        except asyncio.CancelledError:
            await asyncio.wait([turn])  # a turn is short, and the descriptors must outlive it
            turn.exception()  # of which nobody wants to hear any more
            raise
        sent += moved
        if not moved and not await _writable(loop, sock):
            return sent
    return sent


def _turn(sock: int, move: Move, position: int, count: int) -> int:
    """Send for a while; 0 when the socket took nothing."""
    end = time.monotonic() + TURN_S
    count = min(count, TURN_BYTES)
    moved = 0
    while moved < count and time.monotonic() < end:
        try:
            done = move(sock, position + moved, count - moved)
        except BlockingIOError:
            poller = select.poll()
            poller.register(sock, select.POLLOUT)
            if not poller.poll(PATIENCE_MS):
                break
            continue
        if not done:
            raise FileEnded(f"the file is {count - moved} bytes shorter than was announced")
        moved += done
    return moved


async def _writable(loop: asyncio.AbstractEventLoop, sock: int) -> bool:
    ready = asyncio.Event()
    loop.add_writer(sock, ready.set)
    try:
        async with asyncio.timeout(STALL_S):
            await ready.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_writer(sock)
    return True
