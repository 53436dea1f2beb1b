"""The channel's part of the keeper's board: open files, the change under way, requests that crashes survived.

Beside the tables of keeper/board.py it uses two spare words:

    352  u64 registering  not 0: a backing id may have been made that is written nowhere yet (modes.py)
    360  u64 crashes      how many crashes the last worker knew of

and of a request that survived a crash, or that is held back for one that did, the table of deliveries says the strikes
(u16), whether it is held back (u16), and which turn it had (u32; trials.py).
"""

from __future__ import annotations

import contextlib

from heliosfs.fuse.modes import Change
from heliosfs.fuse.tables import BoardFullError, deliveries, init_request, keep_init, open_files
from heliosfs.fuse.trials import NEW, Delivery
from heliosfs.keeper.board import CHANGE, Board

_REGISTERING, _CRASHES_SEEN = 352 // 8, 360 // 8


class Ledger:
    """``Board`` of channel.py. The tables are read once: one ledger to a worker; the channel's lock makes turns."""

    def __init__(self, board: Board, generation: int) -> None:
        self._board, self._generation = board, generation
        self._open, self._deliveries = open_files(board), deliveries(board)
        self.crashed, self.late = board.crashes > board.words[_CRASHES_SEEN], board.late
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

    def deliveries(self) -> dict[int, Delivery]:
        return {key: Delivery(value & 0xFFFF, bool(value >> 16 & 1), value >> 32) for key, value in self._deliveries}

    def deliver(self, unique: int, delivery: Delivery) -> None:
        if delivery == NEW:
            self._deliveries.remove(unique)
            return
        strikes, held, turn = delivery
        with contextlib.suppress(BoardFullError):  # more requests than rows: this one counts as one that was under way
            self._deliveries.put(unique, min(strikes, 0xFFFF) | held << 16 | turn << 32)
