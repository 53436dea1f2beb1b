"""Deadlines that are passed on."""

from __future__ import annotations

import time
from collections.abc import Callable


class Until:
    """A moment by which what is done for one call has to be done."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._at = clock, clock() + timeout_s

    @property
    def left(self) -> float:
        """Seconds; never negative."""
        return max(0.0, self._at - self._clock())
