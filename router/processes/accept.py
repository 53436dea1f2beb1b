"""Connections from listening sockets that several processes share.

The supervisor owns the sockets, so what waits in their queues outlives any process, and an idle process takes what a
busy one would let wait. Each takes one connection at a time and then looks after those it has, which is what shares
them out: asyncio's and uvloop's own servers empty the queue at once, and of 64 clients that came together one of two
processes got between 0 and 61, of 1000 between 202 and 868. Taken one by one it is 31 to 43 of 64 and 456 to 635 of
1000. (A socket for each with SO_REUSEPORT is shared out by the kernel, 33 to 37 of 64, but then a connection waits for
the process that it fell to, whether that is busy, or dead and not replaced yet.)
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from router.descriptors import exhausted
from router.relay.places import Place, Places

log = logging.getLogger("helios.router")

PAUSE_S: Final = 0.2
"""Without a free descriptor the socket is left alone for so long."""
TURN_S: Final = 0.02
"""The same while as many are being turned away as may be at a time."""
TELL_S: Final = 10.0
"""How often the log says that connections are not taken."""
HANDSHAKE_S: Final = 30.0
"""Longest TLS handshake of a client."""


class Acceptor:
    """Hands connections to protocols that ``make`` makes for their places, from ``start`` until ``stop``."""

    def __init__(
        self, sockets: Sequence[socket.socket], make: Callable[[Place], asyncio.Protocol],
        tls: ssl.SSLContext | None, places: Places,
    ) -> None:  # fmt: skip
        """A protocol leaves its place when its connection is lost."""
        self._sockets, self._make, self._tls, self._places = list(sockets), make, tls, places
        self._told_at = -TELL_S
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._resume: dict[socket.socket, asyncio.TimerHandle] = {}

    def start(self) -> None:
        for sock in self._sockets:
            self._loop.add_reader(sock, self._accept, sock)

    async def stop(self) -> None:
        """Take no more, and close this process's hold on the sockets; handshakes under way are given up."""
        for handle in self._resume.values():
            handle.cancel()
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        handshakes = list(self._tasks)
        if self._tls is not None:
            for task in handshakes:
                task.cancel()
        await asyncio.gather(*handshakes, return_exceptions=True)

    def _accept(self, sock: socket.socket) -> None:
        place = self._places.take()
        if place is None:
            self._pause(sock, TURN_S)
            return
        try:
            connection, _ = sock.accept()
        except OSError as error:
            place.leave()
            if exhausted(error):
                self._tell("no connection can be accepted", error.strerror)
                self._pause(sock, PAUSE_S)
            elif not isinstance(error, BlockingIOError | InterruptedError | ConnectionAbortedError):
                raise
            return  # else another process has it, or its client has left
        if place.refused:
            self._tell("connections are turned away", f"{self._places.most} are open, which is the most")
        task = self._loop.create_task(self._adopt(connection, place))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _pause(self, sock: socket.socket, seconds: float) -> None:
        """Leave the socket alone: what comes waits in its queue, or is taken by another process."""
        self._loop.remove_reader(sock)
        self._resume[sock] = self._loop.call_later(seconds, self._loop.add_reader, sock, self._accept, sock)

    def _tell(self, message: str, reason: str | None) -> None:
        now = self._loop.time()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            log.warning(message, extra={"reason": reason})

    async def _adopt(self, connection: socket.socket, place: Place) -> None:
        connection.setblocking(False)
        try:
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                partial(self._make, place),
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_S if self._tls else None,
            )
        except OSError as error:  # TLS errors and deadlines are such, too
            log.debug("a connection came to nothing", extra={"reason": str(error)})
            place.leave()
            connection.close()
        except asyncio.CancelledError:
            place.leave()
            connection.close()
            raise
