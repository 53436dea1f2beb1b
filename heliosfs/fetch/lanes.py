"""The sources, each with what the event loop keeps about it: a limiter, a breaker, a measured link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from helios.errors import DeadlineExceeded, HeliosError, IntegrityError, NotFound, Unavailable
from helios.metrics import MountMetrics
from heliosfs.fetch.breaker import Breaker, in_order
from heliosfs.fetch.budget import Link
from heliosfs.fetch.source import CorruptChunk, Source

T = TypeVar("T")

LIBRARY_SHARE: Final = 0.9
"""The blocking client gives up this much of the deadline in, so that its thread ends before we would abandon it."""


@dataclass(slots=True, eq=False)
class Lane:
    """One source. ``limiter`` bounds its threads, abandoned ones included."""

    source: Source
    limiter: trio.CapacityLimiter
    breaker: Breaker
    link: Link
    running: int = 0
    """Jobs of this lane; the limiter also counts threads whose job was given up."""

    @property
    def free(self) -> int:
        """Calls that could start now."""
        return int(self.limiter.total_tokens) - max(self.running, self.limiter.borrowed_tokens)


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """One source: its round trip in seconds, bytes a second while it delivers, jobs at it now and at most, failures in
    a row, and for how many seconds it is left alone because of them."""

    name: str
    latency_s: float
    rate: float
    running: int
    connections: int
    failures: int
    paused_s: float


class Lanes:
    """All sources in the order of preference."""

    def __init__(
        self,
        sources: Sequence[Source],
        connections: int,
        deadline_s: float,
        budget_cap: int,
        metrics: MountMetrics,
        clock: Callable[[], float],
    ) -> None:
        self.deadline_s = deadline_s
        self._metrics, self._clock = metrics, clock
        self._lanes = [Lane(s, trio.CapacityLimiter(connections), Breaker(), Link(budget_cap)) for s in sources]
        self.reserve = connections // 4 if connections > 1 else 0
        """Calls of each lane that only demand may use."""

    def in_order(self) -> list[Lane]:
        """The lanes in the order to try them now: one that failed a moment ago comes last."""
        return [self._lanes[i] for i in in_order([lane.breaker for lane in self._lanes], self._clock())]

    def ready_at(self) -> float:
        """When the first source may be tried again in the background; in the past when one may now."""
        return min((lane.breaker.until for lane in self._lanes), default=float("inf"))

    @property
    def timeout_s(self) -> float:
        """The silence that the blocking calls allow, in seconds."""
        return self.deadline_s * LIBRARY_SHARE

    def worked(self, lane: Lane) -> None:
        lane.breaker.worked()

    def failed(self, lane: Lane, error: HeliosError) -> bool:
        """Count a failure; only one of the source as a whole makes it come last. Returns whether it is worth a log
        line: failures of one outage are many."""
        self._metrics.fetch_failures.labels(lane.source.name, _reason(error)).inc()
        if isinstance(error, CorruptChunk):
            self._metrics.verify_failures.labels(lane.source.name).inc()
        return not isinstance(error, Unavailable) or lane.breaker.failed(self._clock())

    async def ask(self, what: str, call: Callable[[Source, float], T]) -> T:
        """Make a small blocking call to the first source that can answer it; ``what`` names it in errors.

        Every source is tried once. Raises the last error: one that may pass (Unavailable) if there was any.
        """
        failures: list[HeliosError] = []
        for lane in self.in_order():
            try:
                with trio.fail_after(self.deadline_s):
                    result = await trio.to_thread.run_sync(
                        call, lane.source, self.timeout_s, abandon_on_cancel=True, limiter=lane.limiter
                    )
            except trio.TooSlowError:
                failures.append(DeadlineExceeded(f"{lane.source.name} did not answer in {self.deadline_s:g} s: {what}"))
            except HeliosError as error:
                failures.append(error)
            else:
                self.worked(lane)
                return result
            self.failed(lane, failures[-1])
        raise worst(failures)

    def status(self) -> list[SourceStatus]:
        """How each source does, in the order of preference."""
        now = self._clock()
        return [
            SourceStatus(
                lane.source.name,
                lane.source.latency_s,
                lane.link.rate,
                lane.running,
                int(lane.limiter.total_tokens),
                lane.breaker.failures,
                max(0.0, lane.breaker.until - now),
            )
            for lane in self._lanes
        ]

    def close(self) -> None:
        for lane in self._lanes:
            lane.source.close()


def worst(failures: Sequence[HeliosError]) -> HeliosError:
    """The failure to report when every source failed: one that trying again may cure, else the last."""
    for failure in failures:
        if isinstance(failure, Unavailable):
            return failure
    return failures[-1] if failures else Unavailable("there is no source to fetch from; configure a registry")


def _reason(error: HeliosError) -> str:
    reasons: list[tuple[type[HeliosError], str]] = [
        (CorruptChunk, "corrupt"),
        (IntegrityError, "malformed"),
        (NotFound, "not_found"),
        (DeadlineExceeded, "deadline"),
        (Unavailable, "unavailable"),
    ]
    return next((reason for kind, reason in reasons if isinstance(error, kind)), "other")
