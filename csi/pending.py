"""Which operations are under way. Nothing in here waits between a look and what follows from it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from csi.errors import Pending


class Targets:
    """At most one operation for each key; the second one is told so, as the CSI specification wants (ABORTED)."""

    def __init__(self) -> None:
        self._busy: dict[str, str] = {}

    @contextlib.contextmanager
    def operation(self, key: str, what: str) -> Iterator[None]:
        """The operation ``what`` on ``key``. Raises Pending."""
        if key in self._busy:
            raise Pending(f"{self._busy[key]} {key} is not done yet; ask again")
        self._busy[key] = what
        try:
            yield
        finally:
            del self._busy[key]


class Locks:
    """A lock for each key, as long as somebody has it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def holding(self, key: str, timeout_s: float) -> AsyncIterator[None]:
        """Raises Pending when it is not free in time."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, users + 1
        try:
            try:
                await asyncio.wait_for(lock.acquire(), timeout_s)
            except TimeoutError:
                raise Pending(f"other operations on the volume {key} are not done yet; ask again") from None
            try:
                yield
            finally:
                lock.release()
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = lock, users - 1

    def busy(self, key: str) -> bool:
        """Whether somebody has it or waits for it."""
        return key in self._locks
