"""Bodies of requests, and files that the registry reads itself, into ingests: with bounded memory, a few at a time,
stoppable.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar

from helios.errors import HeliosError, Unavailable
from registry.body import BodySource, feed
from registry.ingest import Source
from registry.ingest.types import SenderGone

T = TypeVar("T")

BODIES: Final = 16
"""Most bodies taken at a time; others wait, without their bytes being read from the network. A slow sender holds his
place, so these are more than the cores could serve; ingests bound their memory themselves."""
CALLS: Final = 4
"""Most other calls at a time; they never wait for a sender."""
PUBLISHES: Final = 8
"""Most publishes at a time. Each writes in its turn, but what is published is looked at before, pickled files whole."""


class Stoppable(Protocol):
    """What an ingest reads from and the event loop can stop. ``taken`` counts the bytes read so far."""

    taken: int

    def fail(self, error: HeliosError) -> None: ...


class OwnSource:
    """What this process reads itself, as a source that can be stopped from another thread. ``inner`` is set by the
    thread that reads."""

    def __init__(self) -> None:
        self.inner: Source | None = None
        self.taken = 0
        self._error: HeliosError | None = None

    def fail(self, error: HeliosError) -> None:
        self._error = error

    def readinto(self, buffer: memoryview, /) -> int:
        if self._error is not None:
            raise self._error
        assert self.inner is not None
        count = self.inner.readinto(buffer)
        self.taken += count
        return count


class Receiver:
    """Takes bodies. Everything but the calls in its threads runs on the event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(BODIES, thread_name_prefix="receive")
        self._slots = asyncio.Semaphore(BODIES)
        self._callers = ThreadPoolExecutor(CALLS, thread_name_prefix="store")
        self._turns = asyncio.Semaphore(CALLS)
        self._publishers = ThreadPoolExecutor(PUBLISHES, thread_name_prefix="publish")
        self._sources: set[Stoppable] = set()
        self._closed = False

    async def receive(
        self,
        size: int,
        where: str,
        body: AsyncIterator[bytes],
        call: Callable[[Source], T],
        among: set[Stoppable] | None = None,
    ) -> T:
        """``call`` in a thread, reading exactly ``size`` bytes of the body; it has ended when this returns or raises.

        Meanwhile its source is ``among`` those that the caller may stop. Raises InvalidInput for a body of another
        length, and what the call raises.
        """
        async with self._slots:
            source = BodySource(size, where)
            async with self._working(self._threads, source, where, lambda: call(source), among) as work:
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

    async def read(
        self,
        where: str,
        call: Callable[[OwnSource], T],
        gone: Callable[[], Awaitable[None]],
        among: set[Stoppable] | None = None,
    ) -> T:
        """``call`` in a thread, reading what is here already; it has ended when this returns or raises.

        What ``gone`` gives ends when the caller has left; then nothing is read further.
        """
        left = asyncio.ensure_future(gone())
        try:
            async with self._turns:
                source = OwnSource()
                async with self._working(self._callers, source, where, lambda: call(source), among) as work:
                    both: list[asyncio.Future[Any]] = [work, left]
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                    if not work.done():
                        source.fail(Unavailable(f"{where}: the sender went away"))
                    return await work
        finally:
            left.cancel()

    async def run(self, call: Callable[[], T]) -> T:
        """A call that stores something which is here already, in a thread that waits for no sender."""
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._callers, call)

    async def publish(self, call: Callable[[], T]) -> T:
        """A call that makes what is stored visible; also during a shutdown, until its requests have ended."""
        return await asyncio.get_running_loop().run_in_executor(self._publishers, call)

    def interrupt(self) -> None:
        """Take nothing new and end what is under way, at the start of a shutdown."""
        self._closed = True
        for source in self._sources:
            source.fail(Unavailable("the registry is stopping; send it again when it is back"))

    async def aclose(self) -> None:
        self._closed = True
        for threads in (self._threads, self._callers, self._publishers):
            await asyncio.to_thread(threads.shutdown)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the registry is stopping; send it again when it is back")

    @contextlib.asynccontextmanager
    async def _working(
        self, threads: Executor, source: Stoppable, where: str, call: Callable[[], T], among: set[Stoppable] | None
    ) -> AsyncIterator[asyncio.Future[T]]:
        """A call in a thread, which has ended when the context is left, whatever the reason."""
        self._check_open()
        work = asyncio.get_running_loop().run_in_executor(threads, call)
        sets = (self._sources,) if among is None else (self._sources, among)
        for each in sets:
            each.add(source)
        try:
            yield work
        finally:
            if not work.done():  # the client left, or we are shutting down
                source.fail(SenderGone(f"{where}: the sender went away"))
                await asyncio.wait([work])  # bounded: a source and the store's buffers have deadlines of their own
            for each in sets:
                each.discard(source)
            if not work.cancelled():
                work.exception()  # it has been raised, or an earlier error has
