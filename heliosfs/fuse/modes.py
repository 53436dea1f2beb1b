"""Which way a file's reads go, decided once for each inode while it is open. No I/O in here.

The kernel's rule (fuse_file_io_open, Linux >= 6.9): all open handles of an inode agree. One that is open through the
page cache can't be opened for passthrough, nor the other way round, and passthrough handles must share one registered
backing file; a mistake is an EIO in somebody's open(). So the first handle decides, later ones repeat it, and the last
one to go frees the decision and the backing file.

    CLOSED -> open, whole file at hand -> PASSTHROUGH(backing, n)   -> last release -> CLOSED, backing is closed
    CLOSED -> open, otherwise          -> CACHED(n)                 -> last release -> CLOSED

A worker may die between any two instructions. So a *change* is written before it begins: which request, which inode,
what was recorded before; and it is taken away when the kernel has the answer and the backing file is closed. A change
that a dead worker left is settled in one of two ways:

- the kernel sends its request again, so it never saw the answer: the record is put back and the request starts over;
- requests come that were never sent before. What is sent again comes ahead of those (fuse_resend), so this one was
  answered: the record is right. Only the backing id that it freed may not have been closed.

Closing a backing id twice does no harm: the kernel counts them up to 2^31 before it gives one out again. That also
finds the id of a worker that died between getting it and writing it down (``registering``): it is among the last ones
before the next that the kernel gives out, and whatever is open has a known one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

LOST: Final = 8
"""So many ids are looked at: one for each worker that died in a row while it registered or looked for the last one's."""


@dataclass(slots=True)
class OpenFile:
    """An inode that is open: its backing id (0: through the page cache) and how many handles there are."""

    backing: int
    opens: int


@dataclass(frozen=True, slots=True)
class Change:
    """A change under way: ``unique`` names the request, ``opens`` is the number of handles before it.

    ``backing`` is the inode's, for a first handle the one that it will have.
    """

    unique: int
    ino: int
    backing: int
    opens: int


class Records(Protocol):
    """Where the state is kept so that the next worker knows it (the keeper's board)."""

    @property
    def changes(self) -> int:
        """How many changes there is room for: one that is made, and those that earlier workers left."""

    @property
    def registering(self) -> bool:
        """Whether a backing id may have been made that is written nowhere."""

    @registering.setter
    def registering(self, now: bool) -> None: ...

    def files(self) -> dict[int, tuple[int, int]]:
        """Backing id and open handles of each open inode."""

    def put(self, ino: int, backing: int, opens: int) -> bool:
        """Write an inode's state; False when there is no room for one more."""

    def remove(self, ino: int) -> None:
        """The inode is closed."""

    def under_way(self) -> dict[int, Change]:
        """The changes that are written down, by row."""

    def begin(self, row: int, change: Change) -> None:
        """Write a change down."""

    def end(self, row: int) -> None:
        """Take it away."""


class IoModes:
    """The modes of all open inodes, from what the last worker left. Used by one thread at a time."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._files = {ino: OpenFile(*state) for ino, state in records.files().items()}
        self._left = records.under_way()
        free = set(range(records.changes)) - self._left.keys()
        self._row = min(free, default=0)  # so many deaths in a row: the oldest is settled as if it were answered
        self._left.pop(self._row, None)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def unsettled(self) -> bool:
        """Whether earlier workers left changes that are not settled."""
        return bool(self._left)

    def came(self, unique: int) -> Iterator[int]:
        """A request was sent again: what a dead worker may have recorded for it did not happen.

        Yields the backing id that nobody uses now, to be closed before the next step.
        """
        for row, change in list(self._left.items()):
            if change.unique != unique:
                continue
            if change.opens:
                self._files[change.ino] = OpenFile(change.backing, change.opens)
                self._records.put(change.ino, change.backing, change.opens)
            else:
                if self._files.pop(change.ino, None) is not None:
                    self._records.remove(change.ino)
                if change.backing:
                    yield change.backing
            self._records.end(row)
            del self._left[row]

    def all_came(self) -> Iterator[int]:
        """All that was sent again has come: what is left was answered. Yields backing ids that may not be closed."""
        for row, change in list(self._left.items()):
            file = self._files.get(change.ino)
            if change.backing and (file is None or file.backing != change.backing):
                yield change.backing
            self._records.end(row)
            del self._left[row]

    def lost(self, following: int) -> list[int]:
        """Backing ids that a dead worker may have got and not written down, given the next one. Asked at the start."""
        known = {file.backing for file in self._files.values()} | {change.backing for change in self._left.values()}
        return [backing for backing in range(max(1, following - LOST), following) if backing not in known]

    def backing(self, ino: int) -> int | None:
        """The backing id that a new handle must have: 0 for none; None when the inode is closed and may choose."""
        file = self._files.get(ino)
        return None if file is None else file.backing

    @property
    def registering(self) -> bool:
        """Whether a backing id may have been made that is written nowhere; ``opened`` writes it down."""
        return self._records.registering

    @registering.setter
    def registering(self, now: bool) -> None:
        self._records.registering = now

    def opened(self, unique: int, ino: int, backing: int) -> bool:
        """A handle is about to be given to the kernel; its mode must be the inode's. False: there is no room for it.

        ``settled`` follows once the answer is written.
        """
        file = self._files.get(ino)
        if file is not None and file.backing != backing:
            raise ValueError(f"inode {ino} is open with backing {file.backing}, not {backing}")
        opens = 0 if file is None else file.opens
        self._records.begin(self._row, Change(unique, ino, backing, opens))
        if file is None:
            self._records.registering = False
            if not self._records.put(ino, backing, 1):
                return False
            self._files[ino] = OpenFile(backing, 1)
            return True
        file.opens += 1
        return self._records.put(ino, backing, file.opens)

    def released(self, unique: int, ino: int) -> int:
        """A handle went. Returns the backing id that nobody uses any more, else 0; unknown inodes are none of ours.

        ``settled`` follows once the answer is written and the backing id is closed.
        """
        file = self._files.get(ino)
        if file is None:
            return 0
        self._records.begin(self._row, Change(unique, ino, file.backing, file.opens))
        file.opens -= 1
        if file.opens > 0:
            self._records.put(ino, file.backing, file.opens)
            return 0
        del self._files[ino]
        self._records.remove(ino)
        return file.backing

    def settled(self) -> None:
        """The kernel has the answer, and nothing is left to be closed."""
        self._records.end(self._row)
