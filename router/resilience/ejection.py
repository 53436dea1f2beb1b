"""Whether a worker is ejected: kept in ``Cells``, so what one process finds counts in all.

Each process compares workers by its own requests (``outlier``). The first that finds one much worse ejects it, for
longer each time; the others then leave it out, too, and begin to count it anew. That it does well again is noted once
in an interval, however many processes find it. Two that find different workers at the same moment may eject both, one
more than ``max_share`` for each further process.
"""

from __future__ import annotations

from collections.abc import Callable

from helios.config import OutlierSettings
from router.resilience.cells import EJECTED_UNTIL, EJECTIONS, JUDGED_AT, Cells


class Ejection:
    """One worker's. ``clock`` gives seconds, ``random`` numbers from 0 to 1."""

    __slots__ = ("_cells", "_clock", "_random", "_settings")

    def __init__(
        self, settings: OutlierSettings, clock: Callable[[], float], random: Callable[[], float], cells: Cells
    ) -> None:
        self._settings, self._clock, self._random, self._cells = settings, clock, random, cells

    @property
    def active(self) -> bool:
        return self._settings.enabled and self._clock() < self.until

    @property
    def until(self) -> float:
        """When the last ejection ends; 0 where there was none."""
        return self._cells.floats[EJECTED_UNTIL]

    @property
    def count(self) -> int:
        """Ejections in a row, less what was forgiven since."""
        return self._cells.ints[EJECTIONS]

    def begin(self) -> float:
        """Give the worker nothing for a time, with a random part of a tenth at most on top; returns the seconds."""
        settings, cells, now = self._settings, self._cells, self._clock()
        count = self.count + 1
        seconds = min(settings.max_eject_s, settings.eject_s * count) * (1 + self._random() / 10)
        cells.floats[JUDGED_AT] = now
        cells.ints[EJECTIONS] = count
        cells.floats[EJECTED_UNTIL] = now + seconds
        cells.note()
        return seconds

    def spared(self) -> None:
        """It was compared, and is none of the worst."""
        count, now = self.count, self._clock()
        if count and now - self._cells.floats[JUDGED_AT] >= self._settings.interval_s:
            self._cells.floats[JUDGED_AT] = now
            self._cells.ints[EJECTIONS] = count - 1
