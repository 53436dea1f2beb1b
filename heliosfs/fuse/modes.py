"""Which way a file's reads go, decided once for each inode while it is open. No I/O in here.

The kernel's rule (fuse_file_io_open, Linux >= 6.9): all open handles of an inode agree. One that is open through the
page cache can't be opened for passthrough, nor the other way round, and passthrough handles must share one registered
backing file; a mistake is an EIO in somebody's open(). Helios never answers FOPEN_DIRECT_IO, so what the kernel says of
that does not come in here. So the first handle decides, later ones repeat it, and the last
one to go frees the decision and the backing file.

    CLOSED -> open, whole file at hand -> PASSTHROUGH(backing, n)   -> last release -> CLOSED, backing is closed
    CLOSED -> open, otherwise          -> CACHED(n)                 -> last release -> CLOSED

A worker may die between any two instructions. So a *change* is written before it begins: which request, which inode,
what was recorded before; and it is taken away when the kernel has the answer and the backing file is closed. The next
worker settles what it finds, before it does anything else (``settle``). Either the kernel sends that request again, so
it never saw the answer: the record is put back and the request starts over. Or it does not, so it saw the answer: the
record is right, and only the backing id that it freed may not have been closed. (Or who asked was killed meanwhile:
then one handle too many is counted until the unmount.)

Closing a backing id twice does no harm: the kernel counts them up to 2^31 before it gives one out again. That also
finds the id of a worker that died between getting it and writing it down (``registering``): it is among the last ones
before the next that the kernel gives out, and whatever is open has a known one.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

LOST: Final = 8
"""So many ids are looked at: one for each worker in a row that died while it registered a file or looked for one."""


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

    @property
    def change(self) -> Change | None:
        """The change that is under way, if any."""

    @change.setter
    def change(self, change: Change | None) -> None: ...


class IoModes:
    """The modes of all open inodes, from what the last worker left. Used by one thread at a time."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._files = {ino: OpenFile(*state) for ino, state in records.files().items()}

    def __len__(self) -> int:
        return len(self._files)

    def settle(self, again: Container[int]) -> Iterator[int]:
        """Settle the change that a dead worker left; ``again``: all requests that the kernel has sent again.

        Called once, before anything else. Yields backing ids that nobody uses, each to be closed before the next step.
        """
        change = self._records.change
        if change is None:
            return
        if change.unique in again and change.opens:
            self._files[change.ino] = OpenFile(change.backing, change.opens)
            self._records.put(change.ino, change.backing, change.opens)
        elif change.unique in again and self._files.pop(change.ino, None) is not None:
            self._records.remove(change.ino)
        if change.backing and change.ino not in self._files:
            yield change.backing
        self._records.change = None

    def lost(self, following: int) -> list[int]:
        """Backing ids that a dead worker may have got and not written down, given the next one. Asked at the start."""
        known = {file.backing for file in self._files.values()}
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
        self._records.change = Change(unique, ino, backing, opens)
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
        self._records.change = Change(unique, ino, file.backing, file.opens)
        file.opens -= 1
        if file.opens > 0:
            self._records.put(ino, file.backing, file.opens)
            return 0
        del self._files[ino]
        self._records.remove(ino)
        return file.backing

    def settled(self) -> None:
        """The kernel has the answer, and nothing is left to be closed."""
        self._records.change = None
