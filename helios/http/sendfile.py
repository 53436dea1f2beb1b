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
from concurrent.futures import Executor
from typing import Final

TURN_BYTES: Final = 16 << 20
TURN_S: Final = 0.1
PATIENCE_MS: Final = 10
"""How long a thread waits for room in the socket: a client that reads takes microseconds."""

STALL_S: Final = 120.0
"""A client that takes nothing for this long is cut off, in seconds."""


class FileEnded(OSError):
    """The file is shorter than what was to be sent."""


async def send(executor: Executor, sock: int, file: int, offset: int, count: int) -> int:
    """Send ``count`` bytes of a file from ``offset`` to a non-blocking socket, both given as descriptors.

    Both must stay open until this returns, and nobody else may write to the socket. Returns how many bytes went:
    fewer when the client has gone or stalled. Raises FileEnded, or OSError when the file can't be read.
    """
    loop = asyncio.get_running_loop()
    sent = 0
    while sent < count:
        turn = loop.run_in_executor(executor, _turn, sock, file, offset + sent, count - sent)
        try:
            moved = await asyncio.shield(turn)
        except ConnectionError:
            return sent
        except asyncio.CancelledError:
            await asyncio.wait([turn])  # a turn is short, and the descriptors must outlive it
            raise
        sent += moved
        if not moved and not await _writable(loop, sock):
            return sent
    return sent


def _turn(sock: int, file: int, offset: int, count: int) -> int:
    """Send for a while; 0 when the socket took nothing."""
    end = time.monotonic() + TURN_S
    count = min(count, TURN_BYTES)
    moved = 0
    while moved < count and time.monotonic() < end:
        try:
            done = os.sendfile(sock, file, offset + moved, count - moved)
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
        await asyncio.wait_for(ready.wait(), STALL_S)
    except TimeoutError:
        return False
    finally:
        loop.remove_writer(sock)
    return True
