"""Shutting down: requests in flight may finish within a grace, then they are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Drain:
    """What becomes of the requests in flight when the router is asked to stop; ``cut`` ends them all."""

    def __init__(self, grace_s: float, cut: Callable[[], None]) -> None:
        self._grace_s, self._cut = grace_s, cut
        self.draining = False

    def step(self) -> None:
        """Asked to stop: the first time starts the grace, the second ends it."""
        if self.draining:
            self._cut()
        else:
            self.draining = True
            asyncio.get_running_loop().call_later(self._grace_s, self._cut)
