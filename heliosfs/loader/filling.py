"""Whether a file that a mount is fetching is worth waiting for. No I/O.

Whoever reads a file while it is fetched has every byte copied twice more, by processors that the fetching needs, too;
once it is whole it is mapped. And reading a file out of turn has the mount fetch it out of turn. So what will be whole
shortly is waited for. What takes longer, or comes no further, is read as it comes: waiting for it would leave all the
work for the end.
"""

from __future__ import annotations

from typing import Final

SHORTLY_S: Final = 3.0
"""A file that will be whole within so many seconds is waited for."""
QUIET_S: Final = 1.0
"""Nothing more of a model having come for so long, in seconds, it is read: that has it fetched, if anything does."""
JUDGED_S: Final = 1.0
"""How fast a model comes is not known earlier: its first bytes come slowly."""
WINDOW_S: Final = 2.0
"""How fast it comes is how fast it came for about so long."""


class Filling:
    """The files of a model that somebody waits for, looked at from time to time."""

    def __init__(self) -> None:
        self._local: dict[str, float] = {}
        self._grown = 0.0
        self._grown_at = 0.0
        self._looks: list[tuple[float, float]] = []

    def worth_waiting(self, now: float, file: str, local: float, size: int) -> bool:
        """``local`` bytes of a file of ``size`` are there ``now``, in seconds of a monotonic clock."""
        more = max(0.0, local - self._local.get(file, local))
        self._local[file] = max(local, self._local.get(file, local))
        self._grown += more
        if more or not self._looks:
            self._grown_at = now
        if not self._looks or now > self._looks[-1][0]:
            self._looks.append((now, self._grown))
        while len(self._looks) > 1 and now - self._looks[1][0] >= WINDOW_S:
            del self._looks[0]
        if now - self._grown_at > QUIET_S:
            return False
        since, then = self._looks[0]
        if now - since < JUDGED_S:
            return True
        return (size - local) * (now - since) <= (self._grown - then) * SHORTLY_S
