"""A file on its way to a client while it comes from the upstream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Final

from helios.errors import Unavailable
from helios.http.server import FilePart
from registry.mirror.asking import unavailable
from registry.pull.flight import Flight, Landed
from registry.pull.retry import limited
from registry.pull.upstream import Upstream

FIRST_S: Final = 8.0
"""Longest wait for the first bytes, in seconds: clients give up after 10."""
PATIENCE_S: Final = 5.0
"""Longest rate limit that a client waits out with us before its first byte, in seconds."""


async def landed(flight: Flight, wait_s: float) -> bool:
    """Whether the flight ends within so many seconds."""
    changed = asyncio.Event()
    with contextlib.suppress(TimeoutError, Landed), flight.reading(0, waker(changed)):
        async with asyncio.timeout(wait_s):
            while not flight.over:
                changed.clear()
                if not flight.over:
                    await changed.wait()
    return flight.over


def waker(changed: asyncio.Event) -> Callable[[], None]:
    """Sets the event of this loop from any thread."""
    loop = asyncio.get_running_loop()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody reads any more
            loop.call_soon_threadsafe(changed.set)

    return wake


async def parts(
    flight: Flight, client: Upstream, start: int, stop: int, stored: Callable[[], AsyncGenerator[FilePart, None]]
) -> AsyncGenerator[FilePart, None]:
    """The bytes ``start`` to ``stop`` as parts of the partial file, in order, each as soon as it is here.

    ``stored`` gives the same bytes from the store, for a file that has just landed. Raises what the flight fails with;
    before the first part also RateLimited or UpstreamUnavailable when that takes too long. A reader that leaves changes
    nothing for others.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(flight.reading(start, waker(changed)))
        except Landed:
            async with contextlib.aclosing(stored()) as kept:
                async for part in kept:
                    yield part
            return
        at, until = start, loop.time() + FIRST_S
        while at < stop:
            changed.clear()  # before the look, so that nothing is missed
            found = reader.ready(at, begun=at > start)
            if found is None:
                if at == start and flight.limited_s > PATIENCE_S:
                    error = limited(f"the upstream {client.endpoint} limits our rate", flight.limited_s)
                    error.quota = client.gate.quota
                    raise error
                try:
                    async with asyncio.timeout_at(until):
                        await changed.wait()
                except TimeoutError:
                    if at == start:
                        raise unavailable(client.endpoint, f"no byte came within {FIRST_S:g} s") from None
                    raise Unavailable(f"{flight.file.path}: the upstream has stopped sending") from None
                continue
            file, end = found
            end = min(end, stop)
            yield FilePart(file, at, end - at)
            at, until = end, loop.time() + client.stall_s + FIRST_S
