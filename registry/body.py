"""A request's body as a blocking ``Source``: a bounded queue between the event loop and an ingest's thread."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from helios.errors import DeadlineExceeded, HeliosError, InvalidInput, Unavailable

LIMIT: Final = 4 << 20
"""Most bytes waiting for the ingest, for each body."""

STALL_S: Final = 120.0
"""Longest silence of a sender, and longest wait for the ingest to take bytes, in seconds."""

GRACE_S: Final = 60.0
SLOWEST: Final = 1024.0
"""A sender who has kept us waiting for longer than ``GRACE_S`` in all must have sent so many bytes for each second of
that: who drips holds a place that others wait for."""


class Pace:
    """How a sender does, from how long each of his pieces was waited for."""

    def __init__(self, where: str) -> None:
        self._where, self._waited, self._got = where, 0.0, 0

    def note(self, seconds: float, count: int) -> None:
        """Raises DeadlineExceeded for one who is too slow to be served."""
        self._waited += seconds
        self._got += count
        if self._waited > GRACE_S and self._got < self._waited * SLOWEST:
            raise DeadlineExceeded(
                f"{self._where}: {self._got} bytes in {self._waited:.0f} s of waiting for them are too few"
            )


class BodySource:
    """Bytes written on the event loop, read in one worker thread.

    The loop side calls ``write`` until the body ends, then ``finish``; ``fail`` at any time makes the reader raise.
    When the reader is gone (its ingest failed) ``abandon`` lets the writer go on without keeping anything.
    """

    def __init__(self, size: int, where: str, *, stall_s: float = STALL_S) -> None:
        self._size, self.where, self._stall_s = size, where, stall_s
        self._loop = asyncio.get_running_loop()
        self._condition = threading.Condition()
        self._parts: deque[memoryview] = deque()
        self._waiting = 0
        self._written = 0
        self.taken = 0
        self._ended = False
        self._abandoned = False
        self._error: HeliosError | None = None
        self._room = asyncio.Event()
        self._room.set()

    async def write(self, data: bytes) -> None:
        """Queue bytes, waiting for room. Raises InvalidInput beyond the announced size."""
        self._written += len(data)
        if self._written > self._size:
            raise InvalidInput(f"{self.where}: the body is longer than the {self._size} bytes announced")
        try:
            async with asyncio.timeout(self._stall_s):  # asyncio.wait_for of Python 3.11 can lose a cancellation
                await self._room.wait()
        except TimeoutError:
            raise Unavailable(f"{self.where}: the store took no bytes for {self._stall_s:.0f} s") from None
        with self._condition:
            if self._abandoned or not data:
                return
            self._parts.append(memoryview(data))
            self._waiting += len(data)
            if self._waiting >= LIMIT:
                self._room.clear()
            self._condition.notify()

    def finish(self) -> None:
        """The body has ended. Raises InvalidInput when it was shorter than announced."""
        if self._written != self._size:
            raise InvalidInput(f"{self.where}: the body has {self._written} bytes, {self._size} were announced")
        with self._condition:
            self._ended = True
            self._condition.notify()

    def fail(self, error: HeliosError) -> None:
        """Make the reader raise."""
        with self._condition:
            self._error = self._error or error
            self._condition.notify()

    def abandon(self) -> None:
        """Nobody reads any more; the writer never waits again. Called on the loop."""
        with self._condition:
            self._abandoned = True
            self._parts.clear()
        self._room.set()

    def readinto(self, buffer: memoryview, /) -> int:
        """See ``registry.ingest.Source``."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._parts or self._ended or self._error, self._stall_s):
                raise DeadlineExceeded(f"{self.where}: no byte came for {self._stall_s:.0f} s")
            if self._error is not None:
                raise self._error
            filled = 0
            while self._parts and filled < len(buffer):
                part = self._parts.popleft()
                count = min(len(part), len(buffer) - filled)
                buffer[filled : filled + count] = part[:count]
                filled += count
                if count < len(part):
                    self._parts.appendleft(part[count:])
            self.taken += filled
            before, self._waiting = self._waiting, self._waiting - filled
            if before >= LIMIT > self._waiting:
                self._loop.call_soon_threadsafe(self._make_room)
        return filled

    def _make_room(self) -> None:
        with self._condition:
            if self._waiting < LIMIT or self._abandoned:
                self._room.set()


async def feed(source: BodySource, body: AsyncIterator[bytes]) -> None:
    """Hand a body to an ingest. What is wrong with the body comes out of the ingest; a sender that left raises here."""
    clock, pace = asyncio.get_running_loop().time, Pace(source.where)
    try:
        before = clock()
        async for data in body:
            pace.note(clock() - before, len(data))
            await source.write(data)
            before = clock()
        source.finish()
    except HeliosError as error:
        source.fail(error)


async def steady(body: AsyncIterator[bytes], stall_s: float = STALL_S) -> AsyncIterator[bytes]:
    """A body piece by piece; raises DeadlineExceeded when none comes for ``stall_s`` seconds, or too little in all."""
    clock, pace = asyncio.get_running_loop().time, Pace("the body")
    while True:
        before = clock()
        try:
            async with asyncio.timeout(stall_s):
                part = await anext(body)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise DeadlineExceeded(f"no byte of the body came for {stall_s:g} s") from None
        pace.note(clock() - before, len(part))
        yield part


async def collect(body: AsyncIterator[bytes], limit: int) -> bytes:
    """All of a short body. Raises InvalidInput for one that is longer than ``limit`` bytes."""
    out = bytearray()
    async for part in steady(body):
        out += part
        if len(out) > limit:
            raise InvalidInput(f"the body is longer than {limit} bytes", hint="Send less at a time.")
    return bytes(out)


class Body:
    """A request's body that begins with a head: ``take`` parts of it, then stream the ``rest``."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = steady(stream)
        self._ahead = bytearray()

    async def take(self, count: int) -> bytes:
        """Exactly the next bytes; raises InvalidInput for a body that ends before."""
        while len(self._ahead) < count:
            data = await anext(self._stream, None)
            if data is None:
                raise InvalidInput(
                    f"the body ends within its head, after {len(self._ahead)} bytes of a part of {count}"
                )
            self._ahead += data
        taken = bytes(self._ahead[:count])
        del self._ahead[:count]
        return taken

    async def rest(self) -> AsyncIterator[bytes]:
        """What was not taken."""
        yield bytes(self._ahead)
        async for data in self._stream:
            yield data
