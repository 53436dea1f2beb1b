"""When a worker that ended is started again. No I/O and no clock of its own.

    starting -> up -> ended: again after a pause, which doubles from FIRST_S to MOST_S
    up for STEADY_S: the next pause is the first again
    never up: given up after TRIES starts, or at once where trying again can't help

Who was up once is never given up: what ended it (memory, a device) may be gone in a while.
"""

from __future__ import annotations

from typing import Final

FIRST_S: Final = 1.0
MOST_S: Final = 60.0
STEADY_S: Final = 120.0
"""A worker that was up for so long works, whatever ends it later, in seconds."""
TRIES: Final = 3
USAGE: Final = 2
"""Exit status of a program that does not take its arguments."""


class Restarts:
    """One worker's. All times in seconds of one clock."""

    def __init__(self) -> None:
        self._pause_s = FIRST_S
        self.tries = 0
        """Starts that ended before it was ever up."""
        self._up_since: float | None = None
        self._was_up = False

    def up(self, now: float) -> None:
        """It takes requests."""
        self._up_since, self._was_up = now, True

    def ended(self, now: float, status: int) -> float | None:
        """It ended with an exit status: when it is to be started again, or None: never."""
        if not self._was_up:
            self.tries += 1
            if self.tries >= TRIES or status == USAGE:
                return None
        if self._up_since is not None and now - self._up_since >= STEADY_S:
            self._pause_s = FIRST_S
        self._up_since = None
        pause_s, self._pause_s = self._pause_s, min(MOST_S, 2 * self._pause_s)
        return now + pause_s
