"""What is held against one worker, and one dispatch to it.

``Guard.clear`` is true for a worker that nothing is held against, so that choosing among healthy workers costs one
attribute each. Breaker and ejection are what all processes have found (``cells``), which ``refresh`` looks at; doubts,
and what a worker is compared by, are each process's own. Everything is synchronous and runs in the event loop's thread.
"""

from __future__ import annotations

import logging
import random as stdlib_random
import time
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from helios.config import RouterSettings
from router.resilience.breaker import Breaker
from router.resilience.cells import Cells, LocalCells
from router.resilience.ejection import Ejection
from router.resilience.latency import Latencies
from router.resilience.liveness import Life, Liveness
from router.resilience.outcome import Outcome
from router.resilience.outlier import Standing

log = logging.getLogger("helios.router")

KEPT: Final = 512
"""First bytes after which the older ones count half."""
SAYS_NOTHING: Final = Outcome.SAYS_NOTHING
FORGOTTEN: Final = 6
"""Comparisons after which what a worker did says nothing any more."""


class Guard:
    """One worker's (or endpoint's) breaker, liveness and ejection. ``clock`` gives seconds, ``random`` 0 to 1."""

    __slots__ = (
        "_clock", "_ejected_until", "_opened", "_settings", "_standing", "asked", "breaker", "clear", "ejection",
        "failed", "forced", "life", "name", "recent", "usual",
    )  # fmt: skip

    def __init__(
        self,
        name: str = "",
        settings: RouterSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = stdlib_random.random,
        opened: Callable[[str], None] = lambda name: None,
        forced: Callable[[str], None] = lambda name: None,
        cells: Cells | None = None,
    ) -> None:
        """``name`` is for logs and metrics. ``opened`` hears when the breaker opens, ``forced`` of each request that is
        sent although the worker should get none. ``cells``: what processes share of it; None: there is but one."""
        settings = settings or RouterSettings()
        cells = LocalCells() if cells is None else cells
        self.name, self._settings, self._clock = name, settings.outliers, clock
        self._opened, self.forced = opened, forced
        self.recent, self.usual = Latencies(), Latencies()
        """Times to the first byte: since the last comparison with other workers, and before."""
        self.asked = self.failed = 0
        """Dispatches since the last comparison."""
        self._standing: Standing | None = None
        self.breaker = Breaker(settings.breaker, clock, random, cells)
        self.ejection = Ejection(settings.outliers, clock, random, cells)
        self._ejected_until = self.ejection.until
        """Of the last ejection that is known here."""
        self.life = Liveness(settings.hang, (self.recent, self.usual), clock)
        self.refresh()

    clear: bool
    """Whether nothing is held against the worker, as far as this process has heard."""

    def admits(self) -> bool:
        """Whether the worker may get a request now."""
        if self.clear:
            return True
        if self.life.state is not Life.ALIVE or self.ejected or self.bad:
            return False
        self.refresh()
        return True

    @property
    def bad(self) -> bool:
        """Whether it most likely can't serve. One that is doubted or slow can, if there is none better."""
        return not self.clear and (self.hung or not self.breaker.allows())

    def came_back(self) -> None:
        """The worker was down and is up again, perhaps as another process: it may show at once what it can do."""
        self.breaker.wake()

    @property
    def rank(self) -> int:
        """How bad it stands, for workers of which none is admitted: ejected, doubted, its breaker open."""
        return self.breaker.state.value * 4 + self.life.state.value * 2 + self.ejected

    @property
    def hung(self) -> bool:
        """Whether nothing would come of a request."""
        return self.life.state is Life.HUNG

    @property
    def reason(self) -> str:
        """Why the worker is never used now; empty where it may be."""
        return self.life.reason if self.hung else ""

    def refresh(self) -> None:
        """See whether something is held against the worker."""
        self.clear = self.breaker.closed and self.life.state is Life.ALIVE and not self.ejected

    def ended(self, period: int, outcome: Outcome) -> None:
        """A dispatch is over (``Attempt``)."""
        well = outcome.well
        if well is not None:
            self.asked += 1
            self.failed += not well
        if not self.breaker.leave(period, well):
            if self.clear and not self.breaker.closed:
                self.refresh()  # another process has found it to fail
            return
        self.refresh()
        if self.breaker.closed:
            log.info("a worker's breaker closes", extra={"worker": self.name})
            return
        self._opened(self.name)
        seconds = round(self.breaker.until - self._clock(), 1)
        log.warning("a worker's breaker opens", extra={"worker": self.name, "seconds": seconds})

    def standing(self, now: float) -> Standing | None:
        """How it did over its last requests. They are counted from zero again once there were enough."""
        settings = self._settings
        if self._ejected_until != self.ejection.until:  # by another process: what came before that was judged
            self._heed_ejection()
        if self.asked >= settings.min_requests:
            enough = self.recent.count >= settings.min_requests / 2
            median = self.recent.quantile(0.5) if enough else None
            self._standing = Standing(median, self.failed / self.asked, now)
            self._anew()
        elif self._standing is not None and now - self._standing.at > FORGOTTEN * settings.interval_s:
            self._standing = None
        return self._standing

    def _anew(self) -> None:
        """Count what it does from now on."""
        self.asked = self.failed = 0
        self.usual.absorb(self.recent)
        if self.usual.count > KEPT:
            self.usual.halve()

    @property
    def ejected(self) -> bool:
        return self.ejection.active

    def eject(self, reason: str) -> None:
        """Give it nothing for a time, in all processes."""
        seconds = self.ejection.begin()
        self._heed_ejection()
        log.warning("a worker is ejected", extra={"worker": self.name, "reason": reason, "seconds": round(seconds, 1)})

    def _heed_ejection(self) -> None:
        """It was, here or in another process."""
        self._ejected_until, self._standing = self.ejection.until, None
        self._anew()
        self.refresh()

    def spared(self) -> None:
        """It was compared, and is none of the worst."""
        self.ejection.spared()


class Attempt:
    """One dispatch, reported once, with ``end``, which may be called again. ``engine``: whether it needs the engine."""

    __slots__ = ("_engine", "_guard", "_period", "_sent_at", "forced", "heard_at", "outcome")

    def __init__(self, guard: Guard, now: float, engine: bool) -> None:
        self._guard: Guard | None = guard
        self.forced = not guard.clear and guard.bad
        """Whether the worker most likely can't serve, but there was no better one."""
        if self.forced:
            guard.forced(guard.name)
        self._period = guard.breaker.enter()
        self._engine, self._sent_at = engine, now
        self.heard_at = 0.0
        self.outcome = SAYS_NOTHING
        """What ``end`` reports."""
        if engine:
            guard.life.begin()

    def begins(self, now: float) -> None:
        """It is sent only now: until now something else was waited for."""
        self._sent_at = now

    def heard(self, now: float, status: int) -> None:
        """Bytes of the answer's body came. An error says nothing about the engine."""
        guard = self._guard
        if guard is None or not self._engine or status >= 400:
            return
        guard.life.unheard_since = now
        if not self.heard_at:
            self.heard_at = now
            guard.recent.add(now - self._sent_at)

    def overtaken(self, now: float) -> None:
        """No byte has come, and none is waited for: the first one takes at least so long there."""
        if self._guard is not None and self._engine and not self.heard_at:
            self._guard.recent.add(now - self._sent_at)

    def end(self) -> None:
        guard, self._guard = self._guard, None
        if guard is None:
            return
        if self._engine:
            guard.life.end(self.outcome.owed and not self.heard_at)
        guard.ended(self._period, self.outcome)


class Guarded(Protocol):
    @property
    def guard(self) -> Guard: ...


T = TypeVar("T", bound=Guarded)


def admitted(workers: list[T]) -> list[T]:
    """Those that may get a request; when none may, the least bad, of which none is hung."""
    if all(one.guard.clear for one in workers):
        return workers
    fine = [one for one in workers if one.guard.admits()]
    if fine:
        return fine
    usable = [one for one in workers if not one.guard.hung]
    least = min((one.guard.rank for one in usable), default=0)
    return [one for one in usable if one.guard.rank == least]
