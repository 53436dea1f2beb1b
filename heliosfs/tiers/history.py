"""How blobs were used, whichever tier has them, and what that makes them worth. No I/O in here, and the caller's clock.

Uses are valued as in LRFU (policy.py). Values are kept as logarithms of "weight now, had it been counted at time 0":
they change only with a use, never with time, and their order is the order of the weights at any time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Final, Protocol

HALF_LIFE_S: Final = 86400.0
"""A use counts half as much after this long, in seconds of the caller's clock."""

REQUEST_BYTES: Final = 64 << 20
"""What one more request costs, as bytes that could have been fetched meanwhile."""

CORRELATED_S: Final = 60.0
"""Opens of one blob within this long, in seconds, are one use: a loader opens a file several times."""

MAX_USES: Final = 16384
"""Blobs whose uses are remembered, beyond those that are here."""


@dataclass(slots=True)
class Use:
    """``weight``: log2 of the decayed number of uses, scaled to time 0; ``last`` and ``counted``: times in seconds."""

    weight: float
    hits: int
    last: float
    counted: float


class Holder(Protocol):
    """What a tier says of itself: a blob that it knows is not forgotten."""

    @property
    def entries(self) -> Sized: ...

    def knows(self, key: str) -> bool: ...


class History:
    """The uses of all blobs, shared by the tiers of a node. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.uses: OrderedDict[str, Use] = OrderedDict()
        """The least recently used first."""
        self._holders: list[Holder] = []

    def join(self, holder: Holder) -> None:
        """A tier whose blobs are remembered as long as it has them."""
        self._holders.append(holder)

    def use(self, key: str) -> None:
        """The blob was opened."""
        now = self.clock()
        use = self.uses.get(key)
        if use is None:
            self.uses[key] = Use(now / HALF_LIFE_S, 1, now, now)
            self._forget()
            return
        self.uses.move_to_end(key)
        use.last = now
        if now - use.counted >= CORRELATED_S:
            use.counted = now
            use.hits += 1
            use.weight = _added(use.weight, now / HALF_LIFE_S)

    def worth(self, key: str, size: int) -> float:
        """log2 of uses times what fetching the blob again costs for each byte of its room; -inf: never used."""
        use = self.uses.get(key)
        return -math.inf if use is None else use.weight + math.log2((REQUEST_BYTES + size) / max(size, 1))

    def recent(self, key: str) -> float:
        """The decayed number of uses now."""
        use = self.uses.get(key)
        return 0.0 if use is None else float(2 ** (use.weight - self.clock() / HALF_LIFE_S))

    def _forget(self) -> None:
        if len(self.uses) > MAX_USES + sum(len(holder.entries) for holder in self._holders):
            for key in self.uses:
                if not any(holder.knows(key) for holder in self._holders):
                    del self.uses[key]
                    return


def _added(weight: float, other: float) -> float:
    """log2(2**weight + 2**other)."""
    high, low = max(weight, other), min(weight, other)
    return high + math.log2(1 + 2 ** (low - high))
