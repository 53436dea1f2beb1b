"""The channel's part of the keeper's board: open files, changes in doubt, requests that crashes survived.

Beside the tables of keeper/board.py it uses its spare words:

    328  u64 unique, u64 ino, u64 backing | opens << 32   the change of an open file that is under way (modes.Doubt)
    352  u64 crashes                                      how many crashes the last worker knew of
"""

from __future__ import annotations

from heliosfs.fuse.modes import Doubt
from heliosfs.keeper.board import Board, BoardFullError

_DOUBT, _CRASHES_SEEN = 328 // 8, 352 // 8


class Ledger:
    """``Board`` of channel.py. The tables are read once: one ledger to a worker; the channel's lock makes turns."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._open, self._deliveries = board.open_files(), board.deliveries()
        self._crashed = board.crashes > board.words[_CRASHES_SEEN]
        board.words[_CRASHES_SEEN] = board.crashes

    @property
    def init(self) -> bytes:
        return self._board.init

    @init.setter
    def init(self, request: bytes) -> None:
        self._board.init = request

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

    def doubt(self) -> Doubt | None:
        unique, ino, state = self._board.words[_DOUBT : _DOUBT + 3]
        return Doubt(unique, ino, state & 0xFFFFFFFF, state >> 32) if unique else None

    def set_doubt(self, doubt: Doubt | None) -> None:
        words = self._board.words
        words[_DOUBT] = 0  # a process killed in between leaves none
        if doubt is not None:
            words[_DOUBT + 1], words[_DOUBT + 2] = doubt.ino, doubt.opens << 32 | doubt.backing
            words[_DOUBT] = doubt.unique

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
