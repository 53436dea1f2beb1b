"""Shutting down: requests in flight may finish within a grace, then they are cut."""

from __future__ import annotations

import asyncio

from router.relay.interrupt import Interruptible, Reason


class Drain:
    """The requests in flight, and what becomes of them when the router is asked to stop."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._active: set[Interruptible] = set()
        self.draining = False

    def add(self, request: Interruptible) -> None:
        self._active.add(request)

    def remove(self, request: Interruptible) -> None:
        self._active.discard(request)

    def step(self) -> None:
        """Asked to stop: the first time starts the grace, the second ends it."""
        if self.draining:
            self.cut()
        else:
            self.draining = True
            asyncio.get_running_loop().call_later(self._grace_s, self.cut)

    def cut(self) -> None:
        """End every request in flight."""
        for request in tuple(self._active):
            request.interrupt(Reason.SHUTDOWN)
