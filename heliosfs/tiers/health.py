"""Whether a tier's disk can be relied on, and when to look at it again. No I/O in here.

    WORKS -> a write finds no room                 -> FULL       what is there is read, nothing is written
    WORKS -> the filesystem became read-only       -> READ_ONLY  the same
    WORKS -> anything else fails, or it is not there -> AWAY     left alone
    any   -> looked at again when due, and it works  -> WORKS

A disk that fails again soon after it worked is looked at less and less often.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import Final

from heliosfs.store.directory import FULL

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
"""After a failure a tier is left alone for this long, at first and at most, in seconds."""


class State(Enum):
    """What can be done with a tier."""

    WORKS = "works"
    FULL = "full"
    READ_ONLY = "read-only"
    AWAY = "away"


class Health:
    """One tier's; times are the caller's, in seconds."""

    def __init__(self) -> None:
        self.state = State.WORKS
        self.reason = ""
        self._pause = 0.0
        self._until = self._since = float("-inf")

    @property
    def readable(self) -> bool:
        """Whether files that are there may be opened."""
        return self.state is not State.AWAY

    @property
    def writable(self) -> bool:
        return self.state is State.WORKS

    def failed(self, error: OSError, now: float) -> bool:
        """Something went wrong; returns whether the state is another one now."""
        before = self.state
        if error.errno in FULL:
            self.state = State.FULL if before is State.WORKS else before
        elif error.errno == errno.EROFS:
            self.state = State.READ_ONLY if before is not State.AWAY else before
        else:
            self.state = State.AWAY
        if before is State.WORKS:
            calm = now - self._since >= LONGEST_PAUSE_S
            self._pause = FIRST_PAUSE_S if calm else min(2 * self._pause, LONGEST_PAUSE_S)
        if self.state is before:
            return False
        self.reason = error.strerror or str(error)
        self._until = now + self._pause
        return True

    def due(self, now: float) -> bool:
        """Whether one that does not work is to be looked at again; the next time is later."""
        if self.writable or now < self._until:
            return False
        self._until = now + self._pause
        return True

    def works(self, now: float) -> None:
        """It was looked at and works."""
        self.state, self.reason, self._since = State.WORKS, "", now
