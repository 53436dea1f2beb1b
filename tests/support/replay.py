"""Replaying traces (traces.py) against cache policies: hit ratios of the tier's own, LRU, LFU and Belady's bound."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from heliosfs.tiers.history import History
from heliosfs.tiers.policy import Bounds, Disk, Policy, Verdict
from tests.support.traces import Access

ENOUGH = Disk(1 << 60, 1 << 60)


@dataclass(frozen=True, slots=True)
class Ratios:
    objects: float
    bytes: float


class Cache(Protocol):
    def access(self, number: int, access: Access) -> bool:
        """The file is opened; returns whether it was here."""


class Kept:
    """The local tier's policy, with removals that take no time."""

    def __init__(self, capacity: int) -> None:
        self._at = 0.0
        self.policy = Policy(Bounds(capacity), History(lambda: self._at))

    def access(self, number: int, access: Access) -> bool:
        self._at, policy, key = access.at, self.policy, access.key
        policy.hold(key)
        policy.use(key, access.group)
        hit = key in policy.entries
        if not hit:
            answer = policy.ask(key, access.size, access.size, ENOUGH, access.group)
            for victim in answer.victims:
                policy.ended(victim, gone=True)
            if policy.ask(key, access.size, access.size, ENOUGH, access.group).verdict is Verdict.GRANTED:
                policy.put(key, access.size, access.size)
            policy.end(key)
            assert policy.bounds.limit is not None
            assert policy.used <= policy.bounds.limit
        policy.let_go(key)
        return hit


class Scored:
    """Whatever has the lowest score goes; ``_score`` says how much a file counts after this access."""

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._here: dict[str, int] = {}
        self._scores: dict[str, tuple[float, int]] = {}

    def access(self, number: int, access: Access) -> bool:
        score = self._score(number, access)
        hit = access.key in self._here
        if hit or self._admit(access, score):
            self._scores[access.key] = (score, number)
        return hit

    def _score(self, number: int, access: Access) -> float:
        raise NotImplementedError

    def _admit(self, access: Access, score: float) -> bool:
        victims, free = [], self._free
        for key in sorted(self._here, key=self._scores.__getitem__):
            if free >= access.size:
                break
            victims.append(key)
            free += self._here[key]
        if free < access.size or any(not self._gives_way(self._scores[key][0], score) for key in victims):
            return False
        for key in victims:
            del self._here[key]
        self._here[access.key] = access.size
        self._free = free - access.size
        return True

    def _gives_way(self, old: float, new: float) -> bool:
        return True


class Lru(Scored):
    def _score(self, number: int, access: Access) -> float:
        return number


class Lfu(Scored):
    """Frequencies are counted for ever, of files that went too."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._counts: Counter[str] = Counter()

    def _score(self, number: int, access: Access) -> float:
        self._counts[access.key] += 1
        return self._counts[access.key]


class Belady(Scored):
    """L. A. Belady, IBM Systems Journal 5(2), 1966: what is used again last goes, and is not taken in.

    With files of different sizes this is no bound for all of them, but knows the future.
    """

    def __init__(self, capacity: int, trace: Sequence[Access]) -> None:
        super().__init__(capacity)
        self._uses: dict[str, list[int]] = defaultdict(list)
        for number, access in enumerate(trace):
            self._uses[access.key].append(number)

    def _score(self, number: int, access: Access) -> float:
        uses = self._uses[access.key]
        after = bisect_right(uses, number)
        return -uses[after] if after < len(uses) else -math.inf

    def _gives_way(self, old: float, new: float) -> bool:
        return old <= new


def replay(trace: Sequence[Access], cache: Cache) -> Ratios:
    """Which share of the opens, and of the bytes of opened files, was here."""
    hits = hit_bytes = 0
    for number, access in enumerate(trace):
        if cache.access(number, access):
            hits += 1
            hit_bytes += access.size
    return Ratios(hits / len(trace), hit_bytes / sum(access.size for access in trace))


def capacity(trace: Sequence[Access], share: float) -> int:
    """A share of the bytes of the files that are opened more than once."""
    counts = Counter(access.key for access in trace)
    sizes = {access.key: access.size for access in trace if counts[access.key] > 1}
    return int(share * sum(sizes.values()))
