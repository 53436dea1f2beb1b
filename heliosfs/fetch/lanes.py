"""The sources, each with what the event loop keeps about it: a limiter, a breaker, a measured link."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, TypeVar

import trio

from helios.errors import DeadlineExceeded, HeliosError, IntegrityError, NotFound, Unavailable
from helios.metrics import MountMetrics
from heliosfs.fetch.breaker import Breaker, in_order
from heliosfs.fetch.budget import Link
from heliosfs.fetch.pace import patience_s
from heliosfs.fetch.source import CorruptChunk, Source
from heliosfs.fetch.width import Width

log = logging.getLogger("heliosfs.fetch")

T = TypeVar("T")

CALLS: Final = 8
"""Most small calls of one source at a time."""

SLOW_PAUSE_S: Final = 2.0
SLOW_LONGEST_PAUSE_S: Final = 60.0
"""A source that was overtaken comes after the others for so many seconds, at first and at most."""

LIBRARY_SHARE: Final = 0.9
"""The blocking client gives up this much of the deadline in, so that its thread ends before we would abandon it."""


@dataclass(slots=True, eq=False)
class Lane:
    """One source. ``limiter`` bounds its threads, abandoned ones included; ``width`` how many the background uses.

    Small calls have a limiter of their own: they never wait for data.
    """

    source: Source
    limiter: trio.CapacityLimiter
    calls: trio.CapacityLimiter
    breaker: Breaker
    slow: Breaker
    link: Link
    width: Width
    running: int = 0
    """Jobs of this lane; the limiter also counts threads whose job was given up."""
    slow_since: float = float("-inf")

    @property
    def used(self) -> int:
        """Calls under way."""
        return max(self.running, self.limiter.borrowed_tokens)

    @property
    def free(self) -> int:
        """Calls that could start now."""
        return int(self.limiter.total_tokens) - self.used

    def until(self) -> float:
        """When it may be tried. One that was slow is on probation then: one call at a time, until one went well."""
        if self.slow.failures and self.running:
            return float("inf")
        return max(self.breaker.until, self.slow.until)


class _Asking(Generic[T]):
    """What came of a call that several sources may be asked."""

    def __init__(self) -> None:
        self.answer: tuple[T] | None = None
        self.failures: list[HeliosError] = []


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
        connections: tuple[int, int],
        deadline_s: float,
        metrics: MountMetrics,
        clock: Callable[[], float],
    ) -> None:
        """``connections``: how many the background uses of a source, at first and at most."""
        self.deadline_s = deadline_s
        self._metrics, self._clock = metrics, clock
        start, most = connections
        reserve = max(1, start // 4)  # calls of each lane that only demand may use
        self._lanes = [
            Lane(
                source,
                trio.CapacityLimiter(max(start, most) + reserve),
                trio.CapacityLimiter(CALLS),
                Breaker(),
                Breaker(SLOW_PAUSE_S, SLOW_LONGEST_PAUSE_S),
                Link(),
                Width(start, most),
            )
            for source in sources
        ]

    def renew(self) -> None:
        """Threads hang, though not for want of a source: others may take their places."""
        for lane in self._lanes:
            lane.limiter = trio.CapacityLimiter(lane.limiter.total_tokens)

    def in_order(self) -> list[Lane]:
        """The lanes in the order to try them now: one that failed, or was overtaken, a moment ago comes last."""
        return [self._lanes[i] for i in in_order([lane.until() for lane in self._lanes], self._clock())]

    @property
    def count(self) -> int:
        return len(self._lanes)

    def instead_of(self, lane: Lane, but: Collection[Lane] = ()) -> Lane | None:
        """Another lane that is ready to take over, and none of ``but``; or None."""
        now = self._clock()
        others = (other for other in self.in_order() if other is not lane and other not in but)
        return next((other for other in others if other.until() <= now and other.free > 0), None)

    def ready_at(self) -> float:
        """When the first source may be tried again in the background; in the past when one may now."""
        return min((lane.breaker.until for lane in self._lanes), default=float("inf"))

    @property
    def timeout_s(self) -> float:
        """The silence that the blocking calls allow, in seconds."""
        return self.deadline_s * LIBRARY_SHARE

    async def warm(self) -> None:
        """Have connections to the source that would be asked first."""
        for lane in self.in_order()[:1]:
            await trio.to_thread.run_sync(lane.source.warm, abandon_on_cancel=True, limiter=lane.calls)

    def worked(self, lane: Lane, started: float) -> None:
        """A call that started then went well."""
        lane.breaker.worked()
        if started > lane.slow_since:
            lane.slow.worked()

    def overtaken(self, lane: Lane, why: str, *, behind: bool = True) -> None:
        """What this source does not bring is asked for elsewhere; ``behind``: it comes after the others for a while."""
        self._metrics.fetch_failures.labels(lane.source.name, why).inc()
        now = self._clock()
        if behind and lane.slow.failed(now):
            lane.slow_since = now
            pause = {"source": lane.source.name, "reason": why, "seconds": round(lane.slow.until - now, 1)}
            log.warning("a source is left behind; others are asked first", extra=pause)

    def failed(self, lane: Lane, error: HeliosError) -> bool:
        """Count a failure; only one of the source as a whole makes it come last. Returns whether it is worth a log
        line: failures of one outage are many."""
        self._metrics.fetch_failures.labels(lane.source.name, _reason(error)).inc()
        if isinstance(error, CorruptChunk):
            self._metrics.verify_failures.labels(lane.source.name).inc()
        return not isinstance(error, Unavailable) or lane.breaker.failed(self._clock())

    async def ask(self, what: str, call: Callable[[Source, float], T]) -> T:
        """Make a small blocking call to the first source that answers it; ``what`` names it in errors.

        Sources are asked in order, the next one when one failed or is silent for a moment; each is asked once. Raises
        the worst error: one that may pass (Unavailable) if there was any.
        """
        asking = _Asking[T]()
        async with trio.open_nursery() as nursery:
            for lane in self.in_order():
                failed = trio.Event()
                nursery.start_soon(self._ask_one, lane, what, call, asking, failed, nursery.cancel_scope)
                with trio.move_on_after(patience_s(True, lane.source.latency_s, self.deadline_s)):
                    await failed.wait()
                if not failed.is_set():
                    self._late(lane)
        if asking.answer is None:
            raise worst(asking.failures)
        return asking.answer[0]

    def _late(self, lane: Lane) -> None:
        """A small call is not answered yet."""
        if self.instead_of(lane) is not None:
            self.overtaken(lane, "silent")

    async def _ask_one(
        self,
        lane: Lane,
        what: str,
        call: Callable[[Source, float], T],
        asking: _Asking[T],
        failed: trio.Event,
        others: trio.CancelScope,
    ) -> None:
        started = self._clock()
        try:
            with trio.fail_after(self.deadline_s):
                ask = partial(call, lane.source, self.timeout_s)
                result = await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=lane.calls)
        except trio.TooSlowError:
            error = DeadlineExceeded(f"{lane.source.name} did not answer in {self.deadline_s:g} s: {what}")
            asking.failures.append(error)
            self.failed(lane, error)
        except HeliosError as error:
            asking.failures.append(error)
            self.failed(lane, error)
        else:
            self.worked(lane, started)
            asking.answer = asking.answer or (result,)
            others.cancel()
        failed.set()

    def status(self) -> list[SourceStatus]:
        """How each source does, in the order of preference."""
        now = self._clock()
        return [
            SourceStatus(
                lane.source.name,
                lane.source.latency_s,
                lane.link.rate,
                lane.running,
                lane.width.count,
                lane.breaker.failures + lane.slow.failures,
                max(0.0, lane.breaker.until - now, lane.slow.until - now),
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
