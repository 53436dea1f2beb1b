"""What numbers that only grow did lately: over the last minute, and a second. No I/O in here; times in seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

SPAN_S: Final = 60.0
"""How far back is remembered, in seconds."""

RATE_S: Final = 10.0
"""Rates are averages over about this long, in seconds."""


class Rates:
    """Samples of named numbers, one every so often; they may come and go."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, Mapping[str, float]]] = deque()

    def feed(self, values: Mapping[str, float]) -> None:
        """Remember what the numbers are now; one sample older than ``SPAN_S`` is kept."""
        now = self._clock()
        self._samples.append((now, values))
        while len(self._samples) > 2 and self._samples[1][0] <= now - SPAN_S:
            self._samples.popleft()

    def grown(self, name: str) -> float:
        """By how much the number grew in the last ``SPAN_S``; what was not there then counts from 0."""
        if not self._samples:
            return 0.0
        return max(0.0, self._samples[-1][1].get(name, 0.0) - self._samples[0][1].get(name, 0.0))

    def rate(self, name: str) -> float:
        """By how much it grows in a second, lately; 0 where it was seen less than twice."""
        seen = [(at, values[name]) for at, values in self._samples if name in values]
        if len(seen) < 2:
            return 0.0
        last, value = seen[-1]
        first, before = next(pair for pair in seen if pair[0] >= last - RATE_S)
        return max(0.0, (value - before) / (last - first)) if last > first else 0.0
