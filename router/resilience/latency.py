"""Times as a histogram with buckets that grow by a fixed factor: any quantile to 19%, in a few hundred bytes."""

from __future__ import annotations

from math import floor, log2
from typing import Final

PER_OCTAVE: Final = 4
"""Buckets for each doubling."""
SHORTEST_S: Final = 1e-4
"""What is shorter is counted as this."""
LONGEST_S: Final = 1e4


class Latencies:
    """Counts by bucket; ``count`` is their sum."""

    __slots__ = ("_buckets", "count")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0

    def add(self, seconds: float) -> None:
        bucket = floor(log2(min(max(seconds, SHORTEST_S), LONGEST_S)) * PER_OCTAVE)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1

    def quantile(self, share: float) -> float:
        """Seconds that this share of the times does not exceed (the upper end of a bucket); 0 when there are none."""
        left = share * self.count
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 1e-9:
                return float(2.0 ** ((bucket + 1) / PER_OCTAVE))
        return 0.0

    def absorb(self, other: Latencies) -> None:
        """Take over what ``other`` counted, which is empty then."""
        for bucket, count in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        self.count += other.count
        other.clear()

    def halve(self) -> None:
        """Forget: what comes from now on counts twice as much."""
        self._buckets = {bucket: count // 2 for bucket, count in self._buckets.items() if count > 1}
        self.count = sum(self._buckets.values())

    def clear(self) -> None:
        self._buckets.clear()
        self.count = 0
