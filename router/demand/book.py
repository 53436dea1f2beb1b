"""What all processes of a router have counted, summed in the control process.

A process's counts outlive it here, but for what it has not said: at most a second's. A control process that takes over
is told everything by those that live, and knows nothing of those that don't: its sums begin anew, with another
``epoch``. ``complete`` is whether as many processes as there should be have been heard of lately: until then sums are
too small.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Final, Literal

from helios.demand import Answers, Held, Line, Times, Waiting
from helios.metrics import LATENCY_S
from helios.pulse import Pulse
from router.demand.counts import Ended, ModelCounts, Queued

SILENT_S: Final = 5.0
"""A process that has said nothing for so long is not counted on, in seconds: they say something every second."""
MOST_MODELS: Final = 20_000
"""Models of processes that are gone whose counts are kept."""


class Sum:
    """What all processes have counted of one model."""

    __slots__ = ("ended", "last_at", "queued", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.last_at = 0.0
        """When a request came last; 0: none has."""
        self.queued: Queued | None = None
        self.ended: dict[str, Ended] = {}

    def add(self, counts: ModelCounts) -> None:
        self.requests += counts.requests
        self.last_at = max(self.last_at, counts.last_at)
        for one in counts.ended:
            known = self.ended.get(one.revision)
            self.ended[one.revision] = one if known is None else _both(known, one)
        if counts.queued is not None:
            self.queued = counts.queued if self.queued is None else _together(self.queued, counts.queued)

    def of_gone(self, model: str) -> ModelCounts:
        """As those of a process in which nobody waits."""
        return ModelCounts(model, self.requests, self.last_at, None, list(self.ended.values()))


class Book:
    """One router's. ``processes``: how many relay; ``clock``: the machine's, in seconds."""

    def __init__(self, processes: int, clock: Callable[[], float]) -> None:
        self.epoch = secrets.token_hex(8)
        self._processes, self._clock = processes, clock
        self._said: dict[int, dict[str, ModelCounts]] = {}
        self._heard: dict[int, float] = {}
        self._gone: dict[str, ModelCounts] = {}
        self.pulse = Pulse()
        """Beats when who waits is another thing, or whether that is all."""

    def counted(self, member: int, counts: Sequence[ModelCounts]) -> None:
        """A process says this of some models; of others what it said before holds."""
        known = self._said.setdefault(member, {})
        before = self.complete
        self._heard[member] = self._clock()
        waits = {one.model for one in counts if _waits(one) or _waits(known.get(one.model))}
        known.update((one.model, one) for one in counts)
        if waits or before is not self.complete:
            self.pulse.beat()

    def gone(self, member: int) -> None:
        """A process has ended. Nobody waits there any more; what it had counted stays counted."""
        self._heard.pop(member, None)
        for model, counts in self._said.pop(member, {}).items():
            kept, known = Sum(), self._gone.pop(model, None)
            if known is not None:
                kept.add(known)
            kept.add(counts)
            self._gone[model] = kept.of_gone(model)
        while len(self._gone) > MOST_MODELS:
            del self._gone[next(iter(self._gone))]
        self.pulse.beat()

    @property
    def complete(self) -> bool:
        """Whether all processes have been heard of lately."""
        since = self._clock() - SILENT_S
        return sum(at > since for at in self._heard.values()) >= self._processes

    def sums(self) -> dict[str, Sum]:
        """By model."""
        found: dict[str, Sum] = {}
        for said in (self._gone, *self._said.values()):
            for model, counts in said.items():
                found.setdefault(model, Sum()).add(counts)
        return found

    # --- who waits ---

    def line(self) -> Line:
        """Who waits now."""
        found: dict[str, Sum] = {}
        for said in self._said.values():
            for model, counts in said.items():
                if counts.queued is not None:
                    found.setdefault(model, Sum()).add(counts)
        now = self._clock()
        held = tuple(Held(model, waiting_of(one.queued, now)) for model, one in sorted(found.items()) if one.queued)
        return Line(self.epoch, self.complete, held)


def waiting_of(queued: Queued, now: float) -> Waiting:
    """As readers have it; ``now`` on the machine's clock."""
    what: Literal["worker", "capacity"] = "worker" if queued.waking else "capacity"
    return Waiting(queued.requests, queued.tokens, round(max(0.0, now - queued.since), 3), what)


def answers_of(one: Ended) -> Answers:
    """As readers have it."""
    times = Times(LATENCY_S, tuple(one.times), round(one.sum, 6))
    return Answers(one.revision, one.ok, one.failed, one.refused, one.elsewhere, times)


def _waits(counts: ModelCounts | None) -> bool:
    return counts is not None and counts.queued is not None


def _together(one: Queued, other: Queued) -> Queued:
    # A process that has not heard yet that a worker is up says so in a moment.
    return Queued(
        one.requests + other.requests, one.tokens + other.tokens, min(one.since, other.since),
        one.waking and other.waking,
    )  # fmt: skip


def _both(one: Ended, other: Ended) -> Ended:
    times = [mine + its for mine, its in zip(one.times, other.times, strict=True)]
    return Ended(
        one.revision, one.ok + other.ok, one.failed + other.failed, one.refused + other.refused,
        one.elsewhere + other.elsewhere, times, one.sum + other.sum,
    )  # fmt: skip
