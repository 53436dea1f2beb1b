"""How many connections a source is read over: more while more make it faster. No I/O in here.

One connection carries at most a window for each round trip, and loses more of it the longer the way is; so a long fat
link needs many, a near one few. Nobody says which one it is, so it is tried: a step up is kept when the rate rose with
it and taken back when not.
"""

from __future__ import annotations

from typing import Final

EPOCH_S: Final = 0.5
"""The rate is looked at this often, in seconds: several round trips of any link."""

STEP: Final = 1.5
"""A step up multiplies the connections by this."""

GAIN: Final = 1.1
"""A step is kept when the rate is this many times what it was."""

HOLD_S: Final = 10.0
LONGEST_HOLD_S: Final = 120.0
"""After a step that gained nothing the next one is tried when so many seconds have passed, at first and at most."""


class Width:
    """Connections to use, from ``start`` up to ``most``; times in seconds, rates in bytes a second."""

    def __init__(self, start: int, most: int) -> None:
        self.count = start
        self._start, self._most = start, max(start, most)
        self._before: tuple[int, float] | None = None  # what a step up left behind: connections, rate
        self._next = 0.0
        self._hold_s = HOLD_S
        self._skip = True

    def look(self, now: float, rate: float, full: bool) -> None:
        """Called often; ``full``: all of them are in use, so that more could help."""
        if not full:
            self._skip, self._next = True, max(self._next, now + EPOCH_S)
            return
        if now < self._next:
            return
        self._next = now + EPOCH_S
        if self._skip:  # this epoch began with something else
            self._skip = False
        elif self._before is None:
            self._up(rate)
        else:
            self._judge(now, rate, *self._before)

    def _up(self, rate: float) -> None:
        count = min(self._most, max(self.count + 1, int(self.count * STEP)))
        if count > self.count:
            self._before, self.count, self._skip = (self.count, rate), count, True

    def _judge(self, now: float, rate: float, count: int, before: float) -> None:
        self._before = None
        if rate >= GAIN * before:
            self._hold_s = HOLD_S
            self._up(rate)
        else:
            self.count, self._skip = count, True
            self._next = now + self._hold_s
            self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S)
