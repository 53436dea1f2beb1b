"""Where a bucket's numbers are kept: a place for each process in memory that they share, or one in a list.

A place is written by the one process that has it, and stays as it is when that dies: what was used stays used. The next
process that gets the place goes on with its numbers.
"""

from __future__ import annotations

from typing import Final, Protocol

COLUMNS: Final = 2
"""``taken`` and ``low``."""


class Places(Protocol):
    """A number for each process."""

    def __getitem__(self, slot: int, /) -> float: ...

    def __setitem__(self, slot: int, value: float, /) -> None: ...

    def __len__(self) -> int: ...


class Sums:
    """The numbers of one bucket, all 0 at first; ``slot``: this process's place."""

    __slots__ = ("low", "slot", "taken")

    def __init__(self, taken: Places, low: Places, slot: int) -> None:
        self.taken = taken
        """All that was ever taken."""
        self.low = low
        """The least that each has seen of what was taken less what flowed in (``buckets``)."""
        self.slot = slot


def alone() -> Sums:
    """Those of a process that shares them with nobody."""
    return Sums([0.0], [0.0], 0)
