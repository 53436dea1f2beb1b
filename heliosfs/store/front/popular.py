"""Which objects a bounded front keeps: no I/O in here, and the caller's clock.

Objects are valued as a node's tiers value blobs (heliosfs/tiers/policy.py): LRFU (D. Lee et al., IEEE Transactions on
Computers 50(12), 2001), where a use weighs half as much a day later, times what fetching the object again costs for
each byte of its room, a request included (Greedy-Dual-Size-Frequency, L. Cherkasova, HPL-98-69R1, 1998). What would
push out something of more worth is not taken in (the idea of TinyLFU, G. Einziger et al., ACM ToS 13(4), 2017), and
uses of what is not here are remembered, too.

It is not that policy itself, because a store is another thing than a node: it has up to millions of objects, so values
are in a heap and nothing is sorted; uses are *shares*, since a store is read in ranges and a header read a thousand
times is no reason to bring 50 GB; and there are no classes, models or reservations of readers that wait.

Weights are kept as logarithms of "weight now, had it been counted at time 0": they change with uses only and never
fall, so an entry of the heap that is out of date is one that is too low, and is put right when it comes up.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

HALF_LIFE_S: Final = 86400.0
"""A use counts half as much after this long, in seconds."""

REQUEST_BYTES: Final = 8 << 20
"""What a request to the cloud costs, as bytes that could have been fetched meanwhile."""

ENOUGH: Final = 1.5
"""An object is worth bringing in once so many times its bytes were asked for within about a day: what was paid for
not having it is more than having it costs then (ski rental, A. Karlin et al., "Competitive snoopy caching", 1988), and
a single pass over everything, such as a verification, brings nothing."""

CORRELATED_S: Final = 60.0
"""Opens of one object within this long, in seconds, are one use."""

MAX_ABSENT: Final = 65536
"""Objects that are not here and whose uses are remembered."""


@dataclass(slots=True)
class Entry:
    """An object that is here. ``held``: it must stay, whatever it is worth."""

    size: int
    weight: float
    opened: float
    held: bool = False


class Popular:
    """What is here, how it is used, and what must go for others. ``limit`` is in bytes (None: none)."""

    def __init__(self, limit: int | None, clock: Callable[[], float]) -> None:
        self.limit, self._clock = limit, clock
        self.entries: dict[str, Entry] = {}
        self.used = self.reserved = self.held = 0
        """Bytes here, promised to what is being written, and, of those here, of what must stay."""
        self._absent: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Of objects that are not here: the weight of all uses, and of those since they were missed."""
        self._heap: list[tuple[float, str]] = []

    # --- what is here ---

    def put(self, key: str, size: int, *, held: bool, used: float | None = None) -> None:
        """The object is here; that it came counts as a use, ``used`` seconds of the clock (default: now)."""
        if key in self.entries:
            self.hold(key, held)
            return
        arrival = (self._clock() if used is None else used) / HALF_LIFE_S
        known = self._absent.pop(key, None)
        weight = arrival if known is None else _sum(known[0], arrival)
        self.entries[key] = entry = Entry(size, weight, -math.inf, held)
        self.used += size
        self.held += size if held else 0
        heapq.heappush(self._heap, (self._value(entry), key))
        if len(self._heap) > 2 * len(self.entries) + 1000:
            self._heap = [(self._value(each), name) for name, each in self.entries.items()]
            heapq.heapify(self._heap)

    def hold(self, key: str, held: bool) -> None:
        """Whether the object must stay, from now on."""
        entry = self.entries[key]
        if entry.held and not held:
            heapq.heappush(self._heap, (self._value(entry), key))  # it left the heap when it came up
        if entry.held != held:
            entry.held = held
            self.held += entry.size if held else -entry.size

    def drop(self, key: str) -> None:
        """The object is not here any more."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.used -= entry.size
            self.held -= entry.size if entry.held else 0
            self._remember(key, entry.weight, -math.inf)

    # --- how it is used ---

    def use(self, key: str, share: float) -> None:
        """So much of the object was read, as a share of its size."""
        if share <= 0:
            return
        added = self._clock() / HALF_LIFE_S + math.log2(share)
        entry = self.entries.get(key)
        if entry is not None:
            entry.weight = _sum(entry.weight, added)
            return
        weight, missed = self._absent.get(key, (-math.inf, -math.inf))
        self._remember(key, _sum(weight, added), _sum(missed, added))

    def opened(self, key: str) -> None:
        """The object was opened as a file; how much of it is read nobody says."""
        entry, now = self.entries.get(key), self._clock()
        if entry is not None and now - entry.opened >= CORRELATED_S:
            entry.opened = now
            self.use(key, 1.0)

    def recent(self, key: str) -> float:
        """How often the object, which is not here, was read lately since it is not, in times of its size."""
        known = self._absent.get(key)
        return 0.0 if known is None else float(2 ** (known[1] - self._clock() / HALF_LIFE_S))

    # --- room ---

    def lacking(self, size: int, free: int, keep_free: int) -> int:
        """Bytes that must go before ``size`` may be written, with ``free`` bytes on the disk of which some stay so."""
        lack = self.reserved + size + keep_free - free
        if self.limit is not None:
            lack = max(lack, self.used + self.reserved + size - self.limit)
        return max(lack, 0)

    def fits(self, size: int) -> bool:
        """Whether it could be here at all."""
        return self.limit is None or self.held + self.reserved + size <= self.limit

    def choose(self, lacking: int, worth: float | None = None) -> list[str] | None:
        """What goes to free so many bytes, what is worth least first; None where that is not enough.

        With ``worth`` also where something would have to go that is worth more. The caller removes it, or says
        ``spare``.
        """
        out: dict[str, None] = {}
        values: list[tuple[float, str]] = []
        freed = 0
        while freed < lacking and self._heap:
            value, key = heapq.heappop(self._heap)
            entry = self.entries.get(key)
            if entry is None or entry.held or key in out:
                continue
            now = self._value(entry)
            if now > value:
                heapq.heappush(self._heap, (now, key))
                continue
            values.append((value, key))
            if worth is not None and value > worth:
                break
            out[key] = None
            freed += entry.size
        if freed >= lacking:
            return list(out)
        for each in values:
            heapq.heappush(self._heap, each)
        return None

    def over(self, free: int, keep_free: int) -> list[str]:
        """What goes because the bounds were overstepped, as far as anything may go."""
        lacking = self.lacking(0, free, keep_free)
        return self.choose(min(lacking, self.used - self.held)) or [] if lacking else []

    def spare(self, key: str) -> None:
        """An object that was chosen could not be removed."""
        if key in self.entries:
            heapq.heappush(self._heap, (self._value(self.entries[key]), key))

    def worth(self, key: str, size: int) -> float:
        """What an object that is not here would be worth; -inf: it was never used."""
        known = self._absent.get(key)
        return -math.inf if known is None else known[0] + _cost(size)

    # --- inside ---

    def _value(self, entry: Entry) -> float:
        return entry.weight + _cost(entry.size)

    def _remember(self, key: str, weight: float, missed: float) -> None:
        self._absent[key] = weight, missed
        self._absent.move_to_end(key)
        if len(self._absent) > MAX_ABSENT:
            self._absent.popitem(last=False)


def _cost(size: int) -> float:
    return math.log2((REQUEST_BYTES + size) / max(size, 1))


def _sum(weight: float, other: float) -> float:
    """log2(2**weight + 2**other)."""
    high, low = max(weight, other), min(weight, other)
    return high if low == -math.inf else high + math.log2(1 + 2 ** (low - high))
