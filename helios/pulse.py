"""A number that grows with each change, for tasks of one event loop that wait for the next one."""

from __future__ import annotations

import asyncio


class Pulse:
    """``version`` is read before looking at what may change: so no change is missed between looking and waiting."""

    def __init__(self) -> None:
        self.version = 0
        self._changed = asyncio.Event()

    def beat(self) -> None:
        """Something is another thing: whoever waits looks."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def after(self, version: int, timeout_s: float) -> None:
        """Wait until ``version`` is past, or for so long, in seconds."""
        if self.version != version:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
