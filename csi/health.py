"""Whether the driver works, and whether it is to be used: what all its health checks say. No I/O.

*Live*: a restart would not help. A mount that is away comes back by itself, and then all works; only when every place
for calls to filesystems holds one that never came back can nothing be done any more. *Ready*: live, and recovered: on a
node the mount has answered, and what an earlier process left is cleared away. Calls are answered before that, too.
"""

from __future__ import annotations

import asyncio

from csi.calls import Calls


class Health:
    """Used on one event loop."""

    def __init__(self, calls: Calls, *, recovering: str = "") -> None:
        """``recovering``: why it is not ready yet; empty: there is nothing to recover."""
        self._calls, self._why = calls, recovering
        self._changed = asyncio.Event()

    @property
    def unlive(self) -> str:
        """Why only a restart would help; empty: nothing is wrong."""
        return "every place for calls to filesystems has one that does not return" if self._calls.exhausted else ""

    @property
    def unready(self) -> str:
        """Why it is not to be used yet; empty: it is."""
        return self.unlive or self._why

    def waits(self, why: str) -> None:
        """It is still recovering."""
        self._tell(why)

    def recovered(self) -> None:
        """From now on it is ready, as long as it is live."""
        self._tell("")

    async def changed(self, timeout_s: float) -> None:
        """Wait until something is told, or for so long, in seconds: liveness changes without being told."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    def _tell(self, why: str) -> None:
        if why != self._why:
            self._why = why
            self._changed.set()
            self._changed = asyncio.Event()
