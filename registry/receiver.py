"""Bodies of requests into ingests: streamed with bounded memory, a few at a time, stoppable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar

from helios.errors import HeliosError, Unavailable
from registry.body import BodySource, feed
from registry.ingest import Source

T = TypeVar("T")

BODIES: Final = 16
"""Most bodies taken at a time; others wait, without their bytes being read from the network. A slow sender holds his
place, so these are more than the cores could serve; ingests bound their memory themselves."""
CALLS: Final = 4
"""Most other calls at a time; they never wait for a sender."""


class Stoppable(Protocol):
    """What an ingest reads from and the event loop can stop."""

    def fail(self, error: HeliosError) -> None: ...


class Receiver:
    """Takes bodies. Everything but the calls in its threads runs on the event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(BODIES, thread_name_prefix="receive")
        self._slots = asyncio.Semaphore(BODIES)
        self._callers = ThreadPoolExecutor(CALLS, thread_name_prefix="store")
        self._sources: set[Stoppable] = set()
        self._closed = False

    async def receive(self, size: int, where: str, body: AsyncIterator[bytes], call: Callable[[Source], T]) -> T:
        """``call`` in a thread, reading exactly ``size`` bytes of the body; it has ended when this returns or raises.

        Raises InvalidInput for a body of another length, and what the call raises.
        """
        async with self._slots:
            self._check_open()
            source = BodySource(size, where)
            self._sources.add(source)
            work = asyncio.get_running_loop().run_in_executor(self._threads, call, source)
            feeder = asyncio.ensure_future(feed(source, body))
            try:
                both: list[asyncio.Future[Any]] = [work, feeder]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if feeder.done():
                    feeder.result()
                return await work
            finally:
                source.abandon()  # an ingest that failed takes no more; the rest of the body is not read
                feeder.cancel()
                await asyncio.wait([feeder])
                self._sources.discard(source)
                await self._end(work, source, where)

    async def run(self, call: Callable[[], T]) -> T:
        """A call that stores something which is here already, in a thread that waits for no sender."""
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._callers, call)

    def interrupt(self) -> None:
        """Take nothing new and end what is under way, at the start of a shutdown."""
        self._closed = True
        for source in self._sources:
            source.fail(Unavailable("the registry is stopping; send it again when it is back"))

    async def aclose(self) -> None:
        self._closed = True
        for threads in (self._threads, self._callers):
            await asyncio.to_thread(threads.shutdown)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the registry is stopping; send it again when it is back")

    async def _end(self, work: asyncio.Future[Any], source: Stoppable, where: str) -> None:
        if not work.done():  # the client left, or we are shutting down
            source.fail(Unavailable(f"{where}: the sender went away"))
            await asyncio.wait([work])  # bounded: a source and the store's buffers have deadlines of their own
        if not work.cancelled():
            work.exception()  # it has been raised, or an earlier error has
