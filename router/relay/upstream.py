"""Connections to workers: kept alive, one request at a time, and what breaks named by what it allows.

Only a request that no worker can have begun may be sent again: the connection was never made (``not_connected``), or
it was a kept-alive one that the worker had closed meanwhile, which breaks at once and without a byte (``stale``).
Whatever else breaks has been at a worker, and a request that kills its worker must not go on to kill the next.

All of it runs in the event loop's thread. Who asks (``Taker``) is told what comes by calls, and lets the connection go
with ``Connection.free`` or ``Connection.abort``; after that it hears nothing more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections import deque
from functools import cache
from typing import Final, Protocol, cast

from router.descriptors import exhausted
from router.relay.framing import BadAnswer, Framing, Head
from router.relay.spool import Spool
from router.resilience.guard import Guard
from router.workers import Address

log = logging.getLogger("helios.router")

KEEP_ALIVE_S: Final = 4.0
"""Idle connections to workers live this long: less than the 5 s after which vLLM closes its side."""
STALE_S: Final = 1.0
"""A reused connection that breaks later than this after the request was sent was not stale."""
JOINED: Final = 64 << 10
"""A body of up to so many bytes is sent in one call with its head."""
PIECE: Final = 256 << 10
"""Bytes of an upload that are read from the disk at a time."""


class Upstream(Protocol):
    """Where requests go: a worker, or an endpoint that is none."""

    @property
    def url(self) -> str: ...

    @property
    def address(self) -> Address: ...

    @property
    def guard(self) -> Guard: ...

    @property
    def ours(self) -> bool:
        """Whether it is one of our workers, whose certificates the settings tell of."""
        ...


class Taker(Protocol):
    """Who takes an answer."""

    def came(self, head: Head | None, piece: bytes, ended: bool) -> None:
        """Bytes of the body, and ``head`` once, before the first; ``ended``: that was all."""
        ...

    def malformed(self, reason: str) -> None:
        """What came is no HTTP; the connection is gone."""
        ...

    def broke(self, reason: str, stale: bool) -> None:
        """The connection broke inside the answer, or before it; ``stale``: no worker can have begun the request."""
        ...


class Asker(Protocol):
    """Who waits for a connection."""

    def connected(self, connection: Connection) -> None:
        """A new connection is there to be used."""
        ...

    def not_connected(self, reason: str) -> None:
        """There is none: nothing was sent."""
        ...

    def out_of_descriptors(self) -> None:
        """There is none, which is not its worker's fault: this process has nothing left to make it with."""
        ...


class Connection(asyncio.Protocol):
    """One connection to a worker."""

    __slots__ = (
        "_asked_at",
        "_full",
        "_loop",
        "_pool",
        "_taker",
        "_told",
        "_transport",
        "_upload",
        "framing",
        "idle_since",
        "reused",
        "worker",
    )

    def __init__(self, pool: Pool, worker: Upstream) -> None:
        self._pool, self.worker = pool, worker
        self._loop = asyncio.get_running_loop()
        self._taker: Taker | None = None
        self._upload: _Upload | None = None
        self.framing = Framing()
        self.reused = self._told = self._full = False
        self.idle_since = self._asked_at = 0.0

    def ask(self, taker: Taker, head: bytes, body: bytes, spool: Spool | None, http11: bool) -> None:
        """Send a request: its head, what ``spool`` holds, ``body``. ``http11``: whether its client speaks HTTP/1.1."""
        self._taker, self._asked_at, self._told = taker, self._loop.time(), False
        self.framing.begin(http11)
        if spool is not None:
            self._transport.write(head)
            self._upload = _Upload(self._transport, spool, body, self._full)  # the head alone may fill it
            self._upload.go_on()
        elif len(body) <= JOINED:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    def free(self) -> None:
        """The answer is over: keep the connection where it can be used again."""
        self._taker = None
        head = self.framing.head
        reusable = head is not None and head.keep_alive and self.framing.ended and self._sent()
        if not reusable or self._transport.is_closing() or self._transport.get_write_buffer_size():
            self._transport.abort()
            return
        self.reused, self.idle_since = True, self._loop.time()
        self._transport.resume_reading()
        self._pool.keep(self)

    def abort(self) -> None:
        """Give up what was asked: the worker sees its client leave."""
        self._taker = None
        self._sent()
        self._transport.abort()

    def _sent(self) -> bool:
        """Whether all of a request from the disk was sent; what was not is not sent any more."""
        upload, self._upload = self._upload, None
        return upload is None or upload.end()

    @property
    def closing(self) -> bool:
        return self._transport.is_closing()

    def pause(self) -> None:
        """Take no more until ``resume``."""
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # --- what the loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self._full = True
        if self._upload is not None:
            self._upload.paused = True

    def resume_writing(self) -> None:
        self._full = False
        if self._upload is not None:
            self._upload.paused = False
            self._upload.go_on()

    def data_received(self, data: bytes) -> None:
        taker = self._taker
        if taker is None:  # nobody asked: whatever it is, the next answer must not be mistaken for it
            self._pool.drop(self)
            self._transport.abort()
            return
        framing = self.framing
        try:
            piece = framing.feed(data)
        except BadAnswer as error:
            self.abort()
            taker.malformed(str(error))
            return
        if self._told:
            taker.came(None, piece, framing.ended)
        elif framing.head is not None:
            self._told = True
            taker.came(framing.head, piece, framing.ended)

    def connection_lost(self, exc: Exception | None) -> None:
        taker, self._taker = self._taker, None
        self._sent()
        if taker is None:
            self._pool.drop(self)
            return
        if exc is None and self._told:
            try:
                rest = self.framing.end_of_input()
            except BadAnswer as error:
                taker.broke(str(error), stale=False)
            else:
                taker.came(None, rest, True)
            return
        soon = self._loop.time() - self._asked_at < STALE_S
        reason = "the connection was closed without an answer" if exc is None else describe(exc)
        taker.broke(reason, stale=self.reused and soon and self.framing.fresh)


class _Upload:
    """Sends a body from the disk, as fast as the worker takes it; also when that has begun to answer meanwhile."""

    __slots__ = ("_held", "_offset", "_reading", "_rest", "_spool", "_transport", "paused")

    def __init__(self, transport: asyncio.Transport, spool: Spool, rest: bytes, paused: bool) -> None:
        """``paused``: whether the transport holds as much as it may already."""
        self._transport, self._spool, self._rest = transport, spool, rest
        self._offset = 0
        self._reading, self.paused, self._held = False, paused, True
        spool.hold()

    def go_on(self) -> None:
        """Read and send more, if it is time."""
        if self._reading or self.paused or self._transport.is_closing():
            return
        if self._offset < self._spool.size:
            self._reading = True
            self._spool.read(self._offset, PIECE, self._read)
        elif self._rest:
            rest, self._rest = self._rest, b""
            self._transport.write(rest)

    def end(self) -> bool:
        """Send no more; returns whether all was sent."""
        whole = self._offset >= self._spool.size and not self._rest
        self._offset, self._rest = self._spool.size, b""
        self._read_all()
        return whole

    def _read_all(self) -> None:
        """Nothing more is needed of the file."""
        if self._held:
            self._held = False
            self._spool.release()

    def _read(self, data: bytes, error: OSError | None) -> None:
        self._reading = False
        if self._offset >= self._spool.size or self._transport.is_closing():
            return
        if error is not None or not data:
            log.error("an upload can't be read again", extra={"reason": str(error)})
            self._transport.abort()  # the worker must not take a part for the whole
            return
        self._offset += len(data)
        if self._offset >= self._spool.size:
            self._read_all()
        self._transport.write(data)
        self.go_on()


class Connecting:
    """A connection that is being made; ``cancel`` gives it up."""

    __slots__ = ("_task",)

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def cancel(self) -> None:
        self._task.cancel()


class Pool:
    """The connections to all workers. Times are in seconds."""

    def __init__(self, connect_timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        """``tls``: how workers with https are met; None: as the system's certificates say."""
        self._timeout_s, self._tls = connect_timeout_s, tls
        self._idle: dict[Upstream, deque[Connection]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def idle(self, worker: Upstream) -> Connection | None:
        """The connection that was used last, if there is one to use again."""
        kept = self._idle.get(worker)
        while kept:
            connection = kept.pop()
            if not connection.closing:
                return connection
        return None

    def connect(self, worker: Upstream, asker: Asker) -> Connecting:
        """Make a connection; the asker is told what came of it, once, unless it cancels."""
        task = asyncio.get_running_loop().create_task(self._connect(worker, asker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return Connecting(task)

    def keep(self, connection: Connection) -> None:
        """The connection can be used again."""
        self._idle.setdefault(connection.worker, deque()).append(connection)

    def drop(self, connection: Connection) -> None:
        """The connection can't be used again."""
        kept = self._idle.get(connection.worker)
        if kept and connection in kept:
            kept.remove(connection)

    def forget(self, worker: Upstream) -> None:
        """The worker is gone: close what is idle."""
        for connection in self._idle.pop(worker, ()):
            connection.abort()

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long."""
        for worker, kept in list(self._idle.items()):
            while kept and now - kept[0].idle_since > KEEP_ALIVE_S:
                kept.popleft().abort()
            if not kept:
                del self._idle[worker]

    async def close(self) -> None:
        """Give up all of them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for kept in self._idle.values():
            for connection in kept:
                connection.abort()
        self._idle.clear()

    async def _connect(self, worker: Upstream, asker: Asker) -> None:
        at = worker.address
        tls = (self._tls if worker.ours and self._tls is not None else _system_tls()) if at.tls else None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._made(worker, at, tls)
        except TimeoutError as error:
            asker.not_connected(
                os.strerror(error.errno).lower() if error.errno else "no connection within the deadline"
            )
        except OSError as error:
            if exhausted(error):
                asker.out_of_descriptors()
            else:
                asker.not_connected(describe(error))
        else:
            asker.connected(connection)

    async def _made(self, worker: Upstream, at: Address, tls: ssl.SSLContext | None) -> Connection:
        """A new connection; one that is idle has to go where there is no descriptor for it. Raises OSError."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(self, worker),
                    at.host,
                    at.port,
                    ssl=tls,
                    server_hostname=at.host if tls else None,
                )
                return connection
            except OSError as error:
                if not exhausted(error) or not self._spare():
                    raise
            await asyncio.sleep(0)  # the loop closes it in its next round

    def _spare(self) -> bool:
        """Close the connection that has been idle the longest; whether there was one."""
        kept = min((kept for kept in self._idle.values() if kept), key=lambda kept: kept[0].idle_since, default=None)
        if kept is None:
            return False
        kept.popleft().abort()
        return True


@cache
def _system_tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def describe(error: BaseException) -> str:
    """Why, without the address, which clients need not know."""
    if isinstance(error, socket.gaierror):
        return "its name can't be resolved"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'reason', '') or 'the handshake failed'}".lower()
    number = getattr(error, "errno", None)
    return os.strerror(number).lower() if number is not None and number > 0 else type(error).__name__
