"""A block that can be ended from outside with a reason: the client left, or the router's shutdown cut it.

Built like ``asyncio.timeout``: the interruption cancels the block's task and is turned into ``Interrupted`` where
the block is left, so that everything inside is cleaned up as for any cancellation. Two things rule out a lost or a
stray cancellation: it is only ever sent while the task waits inside the block (all this runs in the event loop's
thread), and the task's count of cancellations is given back (``uncancel``), so one from elsewhere is not swallowed.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING

from starlette.types import Receive

if TYPE_CHECKING:
    from router.drain import Drain


class Reason(Enum):
    CLIENT_GONE = "client gone"
    SHUTDOWN = "shutdown"


class Interrupted(Exception):
    """The block was ended from outside."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Interruptible:
    """The block. It registers with ``drain``, which interrupts it when the time for requests in flight is over."""

    __slots__ = ("_armed", "_before", "_drain", "_reason", "_task", "_watcher")

    def __init__(self, drain: Drain) -> None:
        self._drain = drain
        self._armed = False
        self._reason: Reason | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Interruptible:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._before, self._armed = task, task.cancelling(), True
        self._drain.add(self)
        return self

    def watch(self, receive: Receive) -> None:
        """From now on (the body has been read) notice when the client leaves."""
        self._watcher = asyncio.create_task(self._until_gone(receive))

    def interrupt(self, reason: Reason) -> None:
        """End the block; the first reason counts."""
        if self._armed and self._reason is None:
            self._reason = reason
            self._task.cancel()

    def disarm(self) -> None:
        """From now on nothing interrupts: the answer is complete."""
        self._armed = False

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._armed = False
        self._drain.remove(self)
        if self._watcher is not None:
            self._watcher.cancel()
        if self._reason is not None and self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise Interrupted(self._reason) from None

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.interrupt(Reason.CLIENT_GONE)
