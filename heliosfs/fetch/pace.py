"""How a transfer gets on, and when another source should be asked for what it has not brought. No I/O in here.

A transfer that brings nothing for a moment, or far less than another source would, is *overtaken*: its source did not
fail, but nobody should wait for it. How long a moment is follows from the source's round trip.
"""

from __future__ import annotations

import math
from typing import Final

SILENT_S: Final = 1.0
"""Silence, in seconds, after which a transfer is overtaken..."""

WAITED_S: Final = 0.6
"""...and where a READ waits for it."""

ROUND_TRIPS: Final = 4.0
"""To that come so many round trips: a lost packet takes about two."""

MOST_PART: Final = 1 / 3
"""But never more than this part of the request's deadline."""

SLOW: Final = 8.0
"""A transfer with less than this part of the rate of another source is overtaken."""

SLOW_S: Final = 2.0
"""Only after so many seconds in which it was not at work on this machine: TCP starts slowly."""

UNKNOWN_RATE: Final = 4 << 20
"""What a source that was not measured is taken to bring, in bytes a second."""

MEMORY_S: Final = 1.0
"""Rates are averaged over about so many seconds."""


class Pace:
    """One transfer: ``since`` is when it last got on, ``rate`` its bytes a second; times in seconds."""

    __slots__ = ("_count", "_looked", "_measured_s", "rate", "since", "started")

    def __init__(self, now: float) -> None:
        self.started = self.since = self._looked = now
        self.rate = self._measured_s = 0.0
        self._count = 0

    def look(self, now: float, count: int, busy: bool) -> int:
        """It has brought ``count`` bytes in all; returns how many are new. ``busy``: it is at work on this machine."""
        new, self._count = count - self._count, count
        if new or busy:
            self.since = now
        passed = now - self._looked
        if passed > 0 and not busy:
            self._measured_s += passed
            part = 1 - math.exp(-passed / MEMORY_S)
            self.rate += part * (new / passed - self.rate)
        self._looked = now
        return new

    def silent(self, now: float, patience_s: float) -> bool:
        """Whether it brought nothing for so long."""
        return now - self.since >= patience_s

    def slow(self, elsewhere: float) -> bool:
        """Whether another source would bring far more; ``elsewhere``: how many bytes a second."""
        return self._measured_s >= SLOW_S and self.rate * SLOW < elsewhere


def patience_s(waited: bool, latency_s: float, deadline_s: float) -> float:
    """The silence that a transfer is allowed while another source is ready; ``waited``: a READ waits for it."""
    return min((WAITED_S if waited else SILENT_S) + ROUND_TRIPS * latency_s, MOST_PART * deadline_s)
