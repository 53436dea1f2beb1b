"""How long the phases of a start took. No I/O."""

from __future__ import annotations

from helios.launch.phases import FIRST


class PhaseTimes:
    """Fed with the phases of one start as they are entered; times in seconds of one clock."""

    def __init__(self, now: float) -> None:
        self._began = self._since = now
        self._current = FIRST
        self._seconds: dict[str, float] = {}

    def entered(self, phase: str, now: float) -> None:
        """What it does from now on. Of ``loading weights: shard 1 of 4`` what stands before the colon counts."""
        seconds = self._seconds.get(self._current, 0.0) + now - self._since
        self._seconds[self._current] = seconds
        self._current, self._since = phase.partition(":")[0], now

    def ended(self, now: float) -> dict[str, float]:
        """The seconds of each phase, of one that was entered twice together."""
        self.entered(self._current, now)
        return dict(self._seconds)

    def total(self, now: float) -> float:
        """Seconds from its beginning."""
        return now - self._began
