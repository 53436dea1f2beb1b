"""Which way a file's reads go, decided once for each inode while it is open. No I/O in here.

The kernel's rule (fuse_file_io_open, Linux >= 6.9): all open handles of an inode agree. One that is open through the
page cache can't be opened for passthrough, nor the other way round, and passthrough handles must share one registered
backing file; a mistake is an EIO in somebody's open(). So the first handle decides, later ones repeat it, and the last
one to go frees the decision and the backing file.

    CLOSED -> open, whole file at hand -> PASSTHROUGH(backing, n)   -> last release -> CLOSED, backing to be closed
    CLOSED -> open, otherwise          -> CACHED(n)                 -> last release -> CLOSED

A worker may die between writing down a change and answering the kernel. So before each change the *doubt* is written:
which request, which inode, and what was recorded before. When the kernel sends that request again, it never saw the
answer: the record is put back and the request starts over. When it does not, the change stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class OpenFile:
    """An inode that is open: its backing id (0: through the page cache) and how many handles there are."""

    backing: int
    opens: int


@dataclass(frozen=True, slots=True)
class Doubt:
    """The change that was under way when a worker died: ``unique`` names the request; what was recorded before."""

    unique: int
    ino: int
    backing: int
    opens: int


class Records(Protocol):
    """Where the state is kept so that the next worker knows it (the keeper's board)."""

    def files(self) -> dict[int, tuple[int, int]]:
        """Backing id and open handles of each open inode."""

    def put(self, ino: int, backing: int, opens: int) -> bool:
        """Write an inode's state; False when there is no room for one more."""

    def remove(self, ino: int) -> None:
        """The inode is closed."""

    def doubt(self) -> Doubt | None:
        """The change that was under way, if any."""

    def set_doubt(self, doubt: Doubt | None) -> None:
        """Write down the change that begins, or that none is under way."""


class IoModes:
    """The modes of all open inodes, from what the last worker left. Used by one thread at a time."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._files = {ino: OpenFile(*state) for ino, state in records.files().items()}
        self._doubt = records.doubt()

    def __len__(self) -> int:
        return len(self._files)

    def came(self, unique: int) -> int:
        """A request was sent again: what a dead worker may have recorded for it did not happen.

        Returns the backing id that nobody uses now, else 0.
        """
        doubt = self._doubt
        if doubt is None or doubt.unique != unique:
            return 0
        self._doubt = None
        if doubt.opens:
            self._files[doubt.ino] = OpenFile(doubt.backing, doubt.opens)
            self._records.put(doubt.ino, doubt.backing, doubt.opens)
            return 0
        file = self._files.pop(doubt.ino, None)
        if file is None:
            return 0
        self._records.remove(doubt.ino)
        return file.backing

    def backing(self, ino: int) -> int | None:
        """The backing id that a new handle must have: 0 for none; None when the inode is closed and may choose."""
        file = self._files.get(ino)
        return None if file is None else file.backing

    def opened(self, unique: int, ino: int, backing: int) -> bool:
        """A handle is about to be given to the kernel; its mode must be the inode's. False: there is no room for it.

        ``settled`` follows once the answer is written.
        """
        file = self._files.get(ino)
        if file is None:
            self._records.set_doubt(Doubt(unique, ino, 0, 0))
            if not self._records.put(ino, backing, 1):
                return False
            self._files[ino] = OpenFile(backing, 1)
            return True
        if file.backing != backing:
            raise ValueError(f"inode {ino} is open with backing {file.backing}, not {backing}")
        self._records.set_doubt(Doubt(unique, ino, file.backing, file.opens))
        file.opens += 1
        return self._records.put(ino, backing, file.opens)

    def released(self, unique: int, ino: int) -> int:
        """A handle went. Returns the backing id that nobody uses any more, else 0; unknown inodes are none of ours.

        ``settled`` follows once the answer is written.
        """
        file = self._files.get(ino)
        if file is None:
            return 0
        self._records.set_doubt(Doubt(unique, ino, file.backing, file.opens))
        file.opens -= 1
        if file.opens > 0:
            self._records.put(ino, file.backing, file.opens)
            return 0
        del self._files[ino]
        self._records.remove(ino)
        return file.backing

    def settled(self) -> None:
        """The kernel has the answer."""
        self._records.set_doubt(None)
