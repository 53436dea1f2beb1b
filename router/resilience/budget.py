"""Retry budget: retries are a share of the requests, plus a few.

A fixed number of retries a request multiplies the load on workers just when they fail (three tries: three times).
Finagle's RetryBudget (twitter.github.io/finagle/guide/Clients.html#retries) and Linkerd's retryBudget bound the sum
instead: over the last ten seconds, retries are at most ``ratio`` of the requests plus ``floor_per_s`` a second, which
lets a router with little traffic retry at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

TTL_S: Final = 10
"""Seconds for which a request pays for retries; Finagle's and Linkerd's default."""


class RetryBudget:
    """One model's. ``clock`` gives seconds."""

    __slots__ = ("_clock", "_floor", "_numbers", "_ratio", "_requests", "_retries", "total")

    def __init__(self, ratio: float, floor_per_s: float, clock: Callable[[], float]) -> None:
        self._ratio, self._floor, self._clock = ratio, floor_per_s * TTL_S, clock
        self._numbers = [-TTL_S] * TTL_S
        self._requests, self._retries = [0] * TTL_S, [0] * TTL_S
        self.total = 0
        """Requests that came, ever."""

    def request(self) -> None:
        """A request has come."""
        self._requests[self._slot()] += 1
        self.total += 1

    @property
    def last_at(self) -> float:
        """The second in which the last one came."""
        return float(max(self._numbers))

    def take(self) -> bool:
        """Whether it may be sent once more, which counts."""
        slot = self._slot()
        oldest = self._numbers[slot] - TTL_S
        live = [one for one in range(TTL_S) if self._numbers[one] > oldest]
        allowed = self._floor + self._ratio * sum(self._requests[one] for one in live)
        if sum(self._retries[one] for one in live) + 1 > allowed + 1e-9:
            return False
        self._retries[slot] += 1
        return True

    def _slot(self) -> int:
        """Where this second is counted."""
        number = int(self._clock())
        slot = number % TTL_S
        if self._numbers[slot] != number:
            self._numbers[slot], self._requests[slot], self._retries[slot] = number, 0, 0
        return slot
