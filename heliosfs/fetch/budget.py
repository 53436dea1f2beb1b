"""How many bytes may be in flight: a quarter of a second's worth. No I/O in here.

A READ that misses shares the link with whatever is in flight already, so what is in flight is bounded by what the link
delivers in ``QUEUE_S``; to that comes what the round trip swallows, or a distant source could never be used fully
(the bandwidth-delay product, as in BBR: Cardwell et al., ACM Queue 14(5), 2016). It starts with a range for each
connection, because TCP starts slowly on each of them and they should do so side by side; it shrinks when the rate is
believed, and at most doubles for each budget delivered.
"""

from __future__ import annotations

import math
from typing import Final

from heliosfs.store.recipe import MAX_CHUNK

QUEUE_S: Final = 0.25
MEMORY_S: Final = 1.0
"""The rate is averaged over about this many seconds in which bytes were on their way."""

SETTLE_S: Final = 0.1
SETTLE_TRIPS: Final = 10
"""The rate is believed after that many seconds and round trips with bytes on their way."""

START_BUDGET: Final = 32 << 20
COMPANY: Final = 2 * MAX_CHUNK
"""The budget while a READ's job is under way on a link of which nothing is known: it may be slow."""

MAX_BUDGET: Final = 256 << 20
MAX_RANGE: Final = 16 << 20
"""Largest background job, in bytes: 16 ms of a 1 GB/s link, which hides the cost of a request."""


class Link:
    """Throughput of one source and the budget that follows from it; times in seconds, sizes in bytes."""

    def __init__(self) -> None:
        self.budget = START_BUDGET
        self._jobs = 0
        self._since = 0.0
        self._bytes = 0.0
        self._busy = 0.0
        self._delivered = 0
        self._measured_s = self._latency_s = 0.0

    @property
    def rate(self) -> float:
        """Bytes a second while something is on its way; 0 when nothing was measured yet."""
        return self._bytes / self._busy if self._busy > 0 else 0.0

    @property
    def settled(self) -> bool:
        """Whether enough was measured to believe the rate: TCP starts slowly."""
        return self._measured_s >= SETTLE_S + SETTLE_TRIPS * self._latency_s

    def range_bytes(self, connections: int) -> int:
        """Size of a background job: at first one for each connection, then a quarter of the budget: 4 MiB on a slow
        link, where a READ would wait behind more, to 16 MiB."""
        return max(MAX_CHUNK, min(self.budget // (4 if self.settled else max(1, connections)), MAX_RANGE))

    def begin(self, now: float) -> None:
        """A job starts."""
        if not self._jobs:
            self._since = now
        self._jobs += 1

    def end(self, now: float) -> None:
        """A job is over."""
        self._advance(now)
        self._jobs -= 1

    def received(self, now: float, count: int, latency_s: float) -> None:
        """Bytes arrived; ``latency_s`` is the source's round trip."""
        self._latency_s = latency_s
        self._advance(now)
        self._bytes += count
        self._delivered += count
        target = max(MAX_CHUNK, min(int(self.rate * (QUEUE_S + latency_s)), MAX_BUDGET))
        if target <= self.budget:
            if self.settled:
                self.budget = target
        elif self._delivered >= self.budget:
            self.budget = min(target, 2 * self.budget)
            self._delivered = 0

    def _advance(self, now: float) -> None:
        if self._jobs:
            passed = max(0.0, now - self._since)
            self._measured_s += passed
            fade = math.exp(-passed / MEMORY_S)
            self._bytes *= fade
            self._busy = self._busy * fade + passed
        self._since = now
