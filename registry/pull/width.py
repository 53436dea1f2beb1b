"""How many ranges of one file to fetch at a time: more while that is faster, fewer when the upstream has trouble."""

from __future__ import annotations

from typing import Final

FIRST: Final = 4
MOST: Final = 16
GAIN: Final = 1.1
"""A wider step stays if bytes come so much faster."""
SAMPLE_S: Final = 1.0
"""Shortest time over which a rate is taken, in seconds."""


class Width:
    """Climbs by two while the rate grows by a tenth, steps back once when it doesn't; halves with trouble.

    Additive increase, multiplicative decrease (D.-M. Chiu and R. Jain, 1989), with the rate as the sign of congestion.
    """

    def __init__(self, now: float, most: int = MOST) -> None:
        self._most = most
        self.now_open = min(FIRST, most)
        self._since, self._bytes = now, 0
        self._best = 0.0
        self._settled = False

    def arrived(self, count: int, now: float) -> None:
        """So many bytes came."""
        self._bytes += count
        passed = now - self._since
        if passed < SAMPLE_S:
            return
        rate = self._bytes / passed
        self._since, self._bytes = now, 0
        if self._settled:
            return
        if rate > self._best * GAIN:
            self._best = rate
            self.now_open = min(self._most, self.now_open + 2)
        else:
            self.now_open = max(1, self.now_open - 2)
            self._settled = True

    def trouble(self, now: float) -> None:
        """A fetch failed."""
        self.now_open = max(1, self.now_open // 2)
        self._since, self._bytes, self._best, self._settled = now, 0, 0.0, False
