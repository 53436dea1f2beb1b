"""What became of the requests of the last minutes, from counts that only grow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from helios.demand import Answers

BIN_S: Final = 5.0
"""Requests are kept in bins of so many seconds."""


@dataclass(slots=True)
class Outcomes:
    """Requests by what became of them (``helios.demand.Answers``), and a histogram of the first tokens of streams:
    ``counts`` for each of ``bounds``, in seconds, and one beyond."""

    ok: int = 0
    failed: int = 0
    refused: int = 0
    elsewhere: int = 0
    bounds: tuple[float, ...] = ()
    counts: list[int] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.ok + self.failed + self.refused

    def __bool__(self) -> bool:
        return bool(self.requests or self.elsewhere or any(self.counts))

    def add(self, other: Outcomes) -> None:
        """Of histograms with other bounds only those count that came last."""
        self.ok += other.ok
        self.failed += other.failed
        self.refused += other.refused
        self.elsewhere += other.elsewhere
        if self.bounds == other.bounds:
            self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        elif any(other.counts) or not self.bounds:
            self.bounds, self.counts = other.bounds, list(other.counts)

    def first_token_s(self, part: float) -> float | None:
        """So long ``part`` (0 to 1) of the streams took at most, in seconds; None: there was none."""
        return quantile(self.bounds, self.counts, part)


def between(before: Answers, after: Answers) -> Outcomes:
    """What has been added between two looks of one epoch."""
    old, new = before.first_token, after.first_token
    same = old.bounds == new.bounds
    counts = [b - a for a, b in zip(old.counts, new.counts, strict=True)] if same else list(new.counts)
    return Outcomes(
        max(0, after.ok_total - before.ok_total), max(0, after.failed_total - before.failed_total),
        max(0, after.refused_total - before.refused_total), max(0, after.elsewhere_total - before.elsewhere_total),
        new.bounds, [max(0, one) for one in counts],
    )  # fmt: skip


class Window:
    """The outcomes of ``length_s`` seconds."""

    def __init__(self, length_s: float) -> None:
        self._length_s = length_s
        self._bins: deque[tuple[float, Outcomes]] = deque()

    def add(self, now: float, outcomes: Outcomes) -> None:
        if not outcomes:
            return
        if not self._bins or now - self._bins[-1][0] >= BIN_S:
            self._bins.append((now, Outcomes()))
        self._bins[-1][1].add(outcomes)
        self._prune(now)

    def since(self, now: float, length_s: float | None = None) -> Outcomes:
        """Of the last ``length_s`` seconds, as exactly as bins are; None: of all that is kept."""
        self._prune(now)
        found, since = Outcomes(), now - (self._length_s if length_s is None else length_s)
        for at, outcomes in self._bins:
            if at >= since:
                found.add(outcomes)
        return found

    def _prune(self, now: float) -> None:
        while self._bins and now - self._bins[0][0] > self._length_s:
            self._bins.popleft()


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float | None:
    """A quantile of a histogram, linear within the bucket it falls into, as Prometheus' ``histogram_quantile`` has it;
    beyond the last bound, that. None where nothing was counted."""
    total = sum(counts)
    if not total:
        return None
    rank, seen = part * total, 0
    for index, count in enumerate(counts):
        if seen + count >= rank and count:
            if index == len(bounds):
                break
            lower = bounds[index - 1] if index else 0.0
            return lower + (bounds[index] - lower) * max(0.0, rank - seen) / count
        seen += count
    return bounds[-1]


def weighted(values: Iterable[tuple[float, int]], part: float) -> float | None:
    """The least of the values (with their weights) that ``part`` of all the weight has at most; None: there is none."""
    known = sorted((value, weight) for value, weight in values if weight > 0)
    rank, seen = part * sum(weight for _, weight in known), 0
    for value, weight in known:
        seen += weight
        if seen >= rank - 1e-9:
            return value
    return None if not known or math.isnan(part) else known[-1][0]
