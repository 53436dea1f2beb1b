"""Whether a worker generates: a vLLM whose engine hangs still answers ``/health``, because another process does that.

    ALIVE --silent for too long--> DOUBTED --no token when asked--> HUNG --a token--> ALIVE

Passive, and free: a worker that has something to do and gave no byte of an answer for longer than it ever takes is
doubted. Silence alone proves nothing (all of its requests may be long ones that are not streamed), so a doubt leads to
a question that only the engine can answer (``tokens``), and that decides. Workers that nobody doubts are never asked:
the question costs the engine a step, and would queue behind real requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

from helios.config import HangSettings
from router.resilience.latency import Latencies


class Life(Enum):
    ALIVE = 0
    DOUBTED = 1
    HUNG = 2


class Liveness:
    """One worker's. ``clock`` gives seconds; ``times``: its times to the first byte."""

    __slots__ = ("_asked_at", "_asking", "_clock", "_settings", "_times", "reason", "state", "unheard_since", "waiting")

    def __init__(self, settings: HangSettings, times: Sequence[Latencies], clock: Callable[[], float]) -> None:
        self._settings, self._times, self._clock = settings, times, clock
        self._asked_at, self._asking = -float("inf"), False
        self.state = Life.ALIVE
        self.waiting = 0
        """Requests at the engine."""
        self.unheard_since: float | None = None
        """Since when it owes an answer's next byte; None: it owes nothing."""
        self.reason = ""

    def begin(self) -> None:
        """A request goes to the engine."""
        self.waiting += 1
        if self.unheard_since is None:
            self.unheard_since = self._clock()

    def end(self, owed: bool) -> None:
        """It is over. ``owed``: without a byte, because who asked did not wait any longer. That is no sign of life."""
        self.waiting -= 1
        if not self.waiting and not owed:
            self.unheard_since = None

    @property
    def patience_s(self) -> float:
        """Silence that is nothing unusual."""
        longest = max(times.quantile(0.99) for times in self._times)
        return max(self._settings.quiet_s, self._settings.factor * longest)

    def look(self) -> bool:
        """Doubt it, if it is time; True when the engine is to be asked now, which ``answered`` or ``silent`` ends."""
        if not self._settings.enabled or self._asking:
            return False
        now = self._clock()
        if self.state is Life.ALIVE:
            if self.unheard_since is None or now - self.unheard_since <= self.patience_s:
                return False
            self.state = Life.DOUBTED
        if now - self._asked_at < self._settings.every_s:
            return False
        self._asking, self._asked_at = True, now
        return True

    def answered(self) -> bool:
        """The engine made a token (or can't be asked); True when the worker was hung until now."""
        self._asking = False
        before, self.state = self.state, Life.ALIVE
        self.unheard_since = self._clock() if self.waiting else None
        return before is Life.HUNG

    def silent(self, reason: str) -> bool:
        """The engine made nothing; True when the worker is hung by it."""
        self._asking = False
        before, self.state, self.reason = self.state, Life.HUNG, reason
        return before is not Life.HUNG
