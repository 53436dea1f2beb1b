"""The channel's part of the keeper's board: open files, the change under way, requests that crashes survived.

Beside the tables of keeper/board.py it uses two spare words:

    352  u64 registering  not 0: a backing id may have been made that is written nowhere yet (modes.py)
    360  u64 crashes      how many crashes the last worker knew of
"""

from __future__ import annotations

from heliosfs.fuse.modes import Change
from heliosfs.fuse.tables import BoardFullError, deliveries, init_request, keep_init, open_files
from heliosfs.keeper.board import CHANGE, Board

_REGISTERING, _CRASHES_SEEN = 352 // 8, 360 // 8


class Ledger:
    """``Board`` of channel.py. The tables are read once: one ledger to a worker; the channel's lock makes turns."""

    def __init__(self, board: Board, generation: int) -> None:
        self._board, self._generation = board, generation
        self._open, self._deliveries = open_files(board), deliveries(board)
        self._crashed = board.crashes > board.words[_CRASHES_SEEN]
        board.words[_CRASHES_SEEN] = board.crashes

    @property
    def dropped(self) -> bool:
        """Whether the keeper gave up on this process: the mount is another one's."""
        return self._board.generation != self._generation

    @property
    def init(self) -> bytes:
        return init_request(self._board)

    @init.setter
    def init(self, request: bytes) -> None:
        keep_init(self._board, request)

    def files(self) -> dict[int, tuple[int, int]]:
        return {file.ino: (file.backing, file.opens) for file in self._open}

    def put(self, ino: int, backing: int, opens: int) -> bool:
        try:
            self._open.put(ino, backing, opens)
        except BoardFullError:
            return False
        return True

    def remove(self, ino: int) -> None:
        self._open.remove(ino)

    @property
    def change(self) -> Change | None:
        unique, ino, state = self._board.words[CHANGE : CHANGE + 3]
        return Change(unique, ino, state & 0xFFFFFFFF, state >> 32) if unique else None

    @change.setter
    def change(self, change: Change | None) -> None:
        words = self._board.words
        words[CHANGE] = 0  # a process killed in between leaves none
        if change is not None:
            words[CHANGE + 1], words[CHANGE + 2] = change.ino, change.opens << 32 | change.backing
            words[CHANGE] = change.unique

    @property
    def registering(self) -> bool:
        return bool(self._board.words[_REGISTERING])

    @registering.setter
    def registering(self, now: bool) -> None:
        self._board.words[_REGISTERING] = now

    def strike(self, unique: int) -> int:
        count = self._deliveries.get(unique) or 0
        if self._crashed:
            count += 1
            try:
                self._deliveries.put(unique, count)
            except BoardFullError:
                return 0  # more requests than rows: the others will tell
        return count

    def forgive(self, unique: int) -> None:
        self._deliveries.remove(unique)
