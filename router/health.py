"""Whether a worker can be used: a state machine without I/O.

Checks and failed dispatches are reported to it. ``unknown`` (no check has answered yet) counts as usable, but after
every worker that is up. Hysteresis: up -> down takes ``FALL`` failures in a row, down -> up ``RISE`` successes in a
row; from ``unknown`` the first report decides.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

FALL: Final = 2
"""Failures in a row after which a worker is down: one lost packet or one full accept queue is not an outage."""
RISE: Final = 2
"""Successes in a row after which a worker is up again: a process that crashes while it loads answers once, perhaps."""
CONFIRM: Final = 4
"""While a change needs confirming, checks come this much faster."""


class State(Enum):
    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


class Health:
    """One worker's health. ``clock`` gives seconds; ``since``: when ``state`` began; ``reason``: the last failure."""

    __slots__ = ("_clock", "_judged", "_report", "_streak", "reason", "since", "state")

    def __init__(self, clock: Callable[[], float], report: Callable[[str], None] | None = None) -> None:
        """``report``: another process judges the worker, and is told of what fails here. That counts here too, so
        that a burst of requests need not wait for the judgement, which then replaces the count."""
        self._clock, self._report = clock, report
        self._streak = 0
        self.state = self._judged = State.UNKNOWN
        self.since = clock()
        self.reason = "not checked yet"

    @property
    def usable(self) -> bool:
        return self.state is not State.DOWN

    def succeeded(self) -> bool:
        """Report a check that succeeded; True when the worker became up by it."""
        if self.state is State.UP:
            self._streak = 0
            return False
        return self._count(State.UP, RISE if self.state is State.DOWN else 1)

    def failed(self, reason: str) -> bool:
        """Report a check that failed, or a connection that did; True when the worker became down by it, and it is
        this process that says so."""
        self.reason = reason
        down = False
        if self.state is State.DOWN:
            self._streak = 0
        else:
            down = self._count(State.DOWN, FALL if self.state is State.UP else 1)
        if self._report is None:
            return down
        self._report(reason)
        return False

    def judged(self, state: State, reason: str) -> State:
        """Take over what another process has decided; returns what that said before, whatever was found here since."""
        if state is not self.state:
            self.state, self.since = state, self._clock()
        self.reason, self._streak = reason, 0
        before, self._judged = self._judged, state
        return before

    def next_check_s(self, interval_s: float) -> float:
        """Seconds until the next check, given those between checks of a worker in a settled state."""
        return interval_s / CONFIRM if self._streak else interval_s

    def _count(self, towards: State, needed: int) -> bool:
        """One more report against the present state."""
        self._streak += 1
        if self._streak < needed:
            return False
        self.state, self.since, self._streak = towards, self._clock(), 0
        return True
