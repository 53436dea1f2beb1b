"""Which source to ask first, and when to leave a failing thing alone. No I/O in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 5.0


class Breaker:
    """Leaves something alone for a while after it failed, longer each time in a row; times in seconds."""

    def __init__(self, first_s: float = FIRST_PAUSE_S, longest_s: float = LONGEST_PAUSE_S) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self.failures = 0
        self.until = float("-inf")

    def ready(self, now: float) -> bool:
        """Whether it may be tried."""
        return now >= self.until

    def failed(self, now: float) -> bool:
        """It failed; returns whether that begins a new pause (several failures of one moment count once)."""
        if now < self.until:
            return False
        self.failures += 1
        self.until = now + min(self._first_s * 2 ** (self.failures - 1), self._longest_s)
        return True

    def worked(self) -> None:
        self.failures = 0
        self.until = float("-inf")


def in_order(untils: Sequence[float], now: float) -> list[int]:
    """Numbers of things in the order to try: as given, those in a pause last, the soonest ready first.

    ``untils`` says when each one's pause ends.
    """
    return sorted(range(len(untils)), key=lambda i: (max(untils[i], now), i))
