"""Places for clients' connections: so many are served, and some more are told that there is no place.

No I/O. Who takes a connection takes a place first, and leaves it when the connection has ended, however that was.
"""

from __future__ import annotations

from typing import Final

SPARE: Final = 16
"""Connections that are turned away at a time; others wait in the kernel's queue until these are gone."""


class Place:
    """One connection's. ``refused``: it is beyond the limit, and only there to be told so."""

    __slots__ = ("_places", "refused")

    def __init__(self, places: Places, refused: bool) -> None:
        self._places: Places | None = places
        self.refused = refused

    def leave(self) -> None:
        """The connection has ended; it may be said twice."""
        places, self._places = self._places, None
        if places is None:
            return
        if self.refused:
            places.refused -= 1
        else:
            places.taken -= 1


class Places:
    """Those of one process. ``taken`` and ``refused`` count the connections that are open."""

    def __init__(self, most: int, spare: int = SPARE) -> None:
        self.most, self._spare = most, spare
        self.taken = self.refused = 0

    def take(self) -> Place | None:
        """A place for one more connection; None: not even one to be turned away at, now."""
        if self.taken < self.most:
            self.taken += 1
            return Place(self, False)
        if self.refused < self._spare:
            self.refused += 1
            return Place(self, True)
        return None
