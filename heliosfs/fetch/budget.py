"""How many bytes may be in flight: a quarter of a second's worth. No I/O in here.

A READ that misses shares the link with whatever is in flight already, so what is in flight is bounded by what the link
delivers in ``QUEUE_S``; to that comes what the round trip swallows, or a distant source could never be used fully
(the bandwidth-delay product, as in BBR: Cardwell et al., ACM Queue 14(5), 2016). The budget starts small and at most
doubles for each budget delivered, so that the burst with which many links begin does not fill the queue.
"""

from __future__ import annotations

import math
from typing import Final

from heliosfs.store.recipe import MAX_CHUNK

QUEUE_S: Final = 0.25
MEMORY_S: Final = 1.0
"""The rate is averaged over about this many seconds in which bytes were on their way."""

MAX_BUDGET: Final = 64 << 20
MAX_RANGE: Final = 16 << 20
"""Largest background job, in bytes: 16 ms of a 1 GB/s link, which hides the cost of a request."""


class Link:
    """Throughput of one source and the budget that follows from it; times in seconds, sizes in bytes."""

    def __init__(self, cap: int = MAX_BUDGET) -> None:
        self.cap = max(MAX_CHUNK, min(cap, MAX_BUDGET))
        self.budget = MAX_CHUNK
        self._jobs = 0
        self._since = 0.0
        self._bytes = 0.0
        self._busy = 0.0
        self._delivered = 0

    @property
    def rate(self) -> float:
        """Bytes a second while something is on its way; 0 when nothing was measured yet."""
        return self._bytes / self._busy if self._busy > 0 else 0.0

    @property
    def range_bytes(self) -> int:
        """Size of a background job: a quarter of the budget, so that several fit into it."""
        return max(MAX_CHUNK, min(self.budget // 4, MAX_RANGE))

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
        self._advance(now)
        self._bytes += count
        self._delivered += count
        target = max(MAX_CHUNK, min(int(self.rate * (QUEUE_S + latency_s)), self.cap))
        if target <= self.budget:
            self.budget = target
        elif self._delivered >= self.budget:
            self.budget = min(target, 2 * self.budget)
            self._delivered = 0

    def _advance(self, now: float) -> None:
        if self._jobs:
            passed = max(0.0, now - self._since)
            fade = math.exp(-passed / MEMORY_S)
            self._bytes *= fade
            self._busy = self._busy * fade + passed
        self._since = now
