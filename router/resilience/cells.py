"""Where a worker's standing is kept: in words that several processes share, or in lists where there is but one.

Two kinds of words, each read and written as a whole:

- *Words of all*, ``ints`` and ``floats``, each with a number of its own (``PHASE`` to ``JUDGED_AT``). Who writes last
  wins, so they hold what any process may say.
- *Columns*, in which each process writes one word of its own, and reads those of all. Counts are kept there: no step is
  lost, and those of a process that died are cleared for it.

A count in a column has a tag: it counts only while that is what the present one is (``tagged``, ``counted``). So one
word of all, changed once, puts the counts of all processes back to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

PHASE, UNTIL, SINCE, STREAK, EJECTED_UNTIL, EJECTIONS, JUDGED_AT = range(7)
"""Words of all. The breaker's: its period and openings, when probes are let through, when it opened or closed last, the
present row of failures. Those of ejections: until when, how many in a row, and when that was changed last."""
ROW, PROBING, SUCCESSES, WINDOW = range(4)
"""Columns: failures in a row, requests under way while it is not closed, successes of such; the window's parts."""
SLOTS: Final = 10
"""Parts of the window, of which the oldest is forgotten at a time."""
COLUMNS: Final = WINDOW + SLOTS
_BITS: Final = 20
_MOST: Final = (1 << _BITS) - 1


class Words(Protocol):
    """Words of all."""

    def __getitem__(self, number: int, /) -> int: ...

    def __setitem__(self, number: int, value: int, /) -> None: ...


class Floats(Protocol):
    """The same words, as numbers with a fraction."""

    def __getitem__(self, number: int, /) -> float: ...

    def __setitem__(self, number: int, value: float, /) -> None: ...


class Cells(Protocol):
    """The words of one worker, as one process sees them; all are 0 at first."""

    @property
    def ints(self) -> Words: ...

    @property
    def floats(self) -> Floats: ...

    def mine(self, column: int) -> int:
        """This process's word of a column."""
        ...

    def put(self, column: int, value: int) -> None:
        """Write it."""
        ...

    def every(self, column: int) -> Iterable[int]:
        """The words of all processes."""
        ...

    def note(self) -> None:
        """Words of all were changed, and other processes have to look at them."""
        ...


class LocalCells:
    """The ``Cells`` of a router that is one process."""

    __slots__ = ("_columns", "floats", "ints")

    def __init__(self) -> None:
        self.ints = [0] * (JUDGED_AT + 1)
        self.floats = [0.0] * (JUDGED_AT + 1)
        self._columns = [0] * COLUMNS

    def mine(self, column: int) -> int:
        return self._columns[column]

    def put(self, column: int, value: int) -> None:
        self._columns[column] = value

    def every(self, column: int) -> Iterable[int]:
        return (self._columns[column],)

    def note(self) -> None:
        pass


def tagged(tag: int, count: int) -> int:
    """A count that is one as long as the tag is the present one; at most 2^20 - 1."""
    return tag << _BITS | min(count, _MOST)


def counted(word: int, tag: int) -> int:
    """The count, if it has this tag."""
    return word & _MOST if word >> _BITS == tag else 0


def add(cells: Cells, column: int, tag: int, step: int) -> None:
    """Add to this process's count in a column, which does not go below 0."""
    cells.put(column, tagged(tag, max(0, counted(cells.mine(column), tag) + step)))


def total(cells: Cells, column: int, tag: int) -> int:
    """The counts of all processes."""
    return sum(counted(word, tag) for word in cells.every(column))
