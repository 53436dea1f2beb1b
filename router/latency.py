"""Peak EWMA: an average of times that forgets, and that believes bad news at once.

Finagle's estimate for balancing: a time above the average replaces it, one below moves it by ``1 - exp(-age /
TAU_S)``, so what is old counts less however often it was measured. Without news the estimate sinks by the same rule:
a worker that was slow is tried again.
"""

from __future__ import annotations

import math
from typing import Final

TAU_S: Final = 10.0
"""After so many seconds a time counts 1/e."""


class PeakEwma:
    """An estimate in seconds; 0 until something was observed. ``now`` is in seconds and never runs back."""

    __slots__ = ("_at", "_value")

    def __init__(self) -> None:
        self._value = self._at = 0.0

    def observe(self, seconds: float, now: float) -> None:
        past = self.value(now)
        if seconds >= past:
            self._value = seconds
        else:
            self._value = seconds + (self._value - seconds) * math.exp((self._at - now) / TAU_S)
        self._at = now

    def value(self, now: float) -> float:
        return self._value * math.exp((self._at - now) / TAU_S)
