"""Whether a model's requests come in company: learnt online, a few numbers a model.

Users come with several requests, programs at fixed times. What a replica that is kept up spares are the requests that
would have found none: one out of silence, and those that come while one starts. So two things are compared with what
requests that know nothing of one another would do at the rate that is forecast:

- how often silence ends: the hazard of a request after ``QUIET_S`` without any, observed by expected events (as in an
  occurrence and exposure rate; Andersen, Borgan, Gill and Keiding, Statistical Models Based on Counting Processes,
  IV.1), with some expected ones on either side, so that little seen means little;
- how many come right after that.

No I/O; times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import msgspec

from orchestrator.scaling.outlook import Company

QUIET_S: Final = 300.0
"""After so long without a request it is silent: by then nothing is kept for those that were."""
AFTER_S: Final = 60.0
"""How long after a silence is meant by right after."""
FADES_S: Final = 14 * 86_400.0
"""How far what is remembered goes back, in seconds that were looked at for it."""
PRIOR: Final = 10.0
"""Ends of a silence on either side."""
LONG_AGO_S: Final = 1e6
LEAST: Final = 0.05
"""Of what would come alone, so many do in any case."""


class Habits(msgspec.Struct):
    """What is remembered. ``observe`` at each look, in order."""

    quiet_s: float = 0.0
    """How long it has been silent; how long ago that ended..."""
    after_s: float = LONG_AGO_S
    """...at most ``LONG_AGO_S``."""
    ends: float = 0.0
    """Silences that ended, and how many would have at the rate that was forecast."""
    ends_due: float = 0.0
    followed: float = 0.0
    """Requests right after that, and how many would have come."""
    followed_due: float = 0.0
    follow_s: float = 0.0
    """How long was looked, right after."""

    def observe(self, elapsed_s: float, arrivals: int, rate: Callable[[], float]) -> None:
        """``arrivals``: since the look before, ``elapsed_s`` ago. ``rate``: requests a second that are expected now;
        asked where it matters."""
        if self.quiet_s >= QUIET_S:
            self._silent(elapsed_s, arrivals, rate())
        elif self.after_s < AFTER_S:
            self._right_after(elapsed_s, arrivals, rate())
        self.after_s = min(LONG_AGO_S, self.after_s + elapsed_s)
        if arrivals:
            self.after_s = 0.0 if self.quiet_s >= QUIET_S else self.after_s
            self.quiet_s = 0.0
        else:
            self.quiet_s += elapsed_s

    def missed(self) -> None:
        """Nobody knows what came since the look before."""
        self.quiet_s, self.after_s = 0.0, LONG_AGO_S

    def _silent(self, elapsed_s: float, arrivals: int, rate: float) -> None:
        kept = math.exp(-elapsed_s / FADES_S)
        self.ends = self.ends * kept + (1.0 if arrivals else 0.0)
        self.ends_due = self.ends_due * kept + 1 - math.exp(-rate * elapsed_s)
        if arrivals:  # the first one came in the middle of it
            self._right_after(elapsed_s / 2, arrivals - 1, rate)

    def _right_after(self, elapsed_s: float, arrivals: int, rate: float) -> None:
        kept = math.exp(-elapsed_s / FADES_S)
        self.followed = self.followed * kept + arrivals
        self.followed_due = self.followed_due * kept + rate * elapsed_s
        self.follow_s = self.follow_s * kept + elapsed_s

    @property
    def company(self) -> Company:
        alone = (self.ends + PRIOR) / (self.ends_due + PRIOR)
        along = (self.followed - self.followed_due) / (self.follow_s + PRIOR * AFTER_S)
        return Company(max(LEAST, min(1.0, alone)), max(0.0, along))
