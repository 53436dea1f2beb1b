"""Which sources failed to bring which chunks of a blob. No I/O in here.

What one source did not bring goes back to the planner, and the next one is asked when there is room for that. So that
every source is asked once before anybody is told that a chunk can't be had, what was tried is remembered here until
the chunk comes, until all of them failed, or until somebody asks who had not waited before.
"""

from __future__ import annotations

from collections.abc import Collection

from helios.errors import HeliosError, Unavailable
from heliosfs.fetch.lanes import Lane


class Tried:
    """Of one blob. State of the event loop; an entry a chunk that failed somewhere and is not here."""

    def __init__(self) -> None:
        self._failures: dict[int, dict[Lane, HeliosError]] = {}

    def failed(self, index: int, lane: Lane, error: HeliosError) -> None:
        """A source did not bring the chunk. Of the error only its message is kept: its frames may hold much."""
        error.__cause__ = error.__context__ = None
        self._failures.setdefault(index, {})[lane] = error.with_traceback(None)

    def of(self, index: int) -> Collection[Lane]:
        """The sources that failed to bring the chunk."""
        return self._failures.get(index, {}).keys()

    def for_good(self, index: int) -> Collection[Lane]:
        """Those of them that have nothing better: what they sent was wrong, or they have none."""
        return [lane for lane, error in self._failures.get(index, {}).items() if not isinstance(error, Unavailable)]

    def again(self, index: int) -> None:
        """What may have passed counts as not tried."""
        self._failures[index] = {lane: self._failures[index][lane] for lane in self.for_good(index)}

    def forget(self, index: int) -> list[HeliosError]:
        """Nothing was tried; returns what had failed."""
        return list(self._failures.pop(index, {}).values())
