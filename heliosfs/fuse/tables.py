"""The board as the worker uses it: its tables, with an index in this process, and INIT. The layout: keeper/board.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from heliosfs.keeper.board import DELIVERIES, DELIVERY_ROWS, FILE_ROWS, FILES, INIT, INIT_MAX, Board


class BoardFullError(OSError):
    """A table of the board has no free row."""


class OpenFile(NamedTuple):
    """A file that is open in the kernel. ``backing``: its passthrough id, 0 for none; ``opens``: its handles."""

    ino: int
    backing: int
    opens: int


class Table:
    """Rows of a key, never 0, and a value, both u64. An index in this process finds them."""

    def __init__(self, words: memoryview, first: int, rows: int) -> None:
        self._words = words
        keys = words[first : first + 2 * rows : 2].tolist()
        self._at = {key: first + 2 * row for row, key in enumerate(keys) if key}
        self._free = [first + 2 * row for row in reversed(range(rows)) if not keys[row]]

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((key, self._words[at + 1]) for key, at in list(self._at.items()))

    def get(self, key: int) -> int | None:
        at = self._at.get(key)
        return None if at is None else self._words[at + 1]

    def put(self, key: int, value: int) -> None:
        """Add the row or change its value. Raises BoardFullError."""
        at = self._at.get(key)
        if at is not None:
            self._words[at + 1] = value
            return
        if not key:
            raise ValueError("0 marks a free row")
        if not self._free:
            raise BoardFullError(f"all {len(self._at)} rows are taken")
        at = self._free.pop()
        self._words[at + 1] = value
        self._words[at] = key
        self._at[key] = at

    def remove(self, key: int) -> None:
        """Remove the row if there is one."""
        at = self._at.pop(key, None)
        if at is not None:
            self._words[at] = 0
            self._free.append(at)


class OpenFiles:
    """Which regular files the kernel has open, by inode number."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[OpenFile]:
        return (_open_file(ino, value) for ino, value in self._table)

    def get(self, ino: int) -> OpenFile | None:
        value = self._table.get(ino)
        return None if value is None else _open_file(ino, value)

    def put(self, ino: int, backing: int, opens: int) -> None:
        """Add the file or change what is said of it. Raises BoardFullError."""
        self._table.put(ino, opens << 32 | backing)

    def remove(self, ino: int) -> None:
        """Forget the file if it is known."""
        self._table.remove(ino)


def deliveries(board: Board) -> Table:
    """The table of deliveries, read now: ``unique`` of a request without the resend bit -> see ledger.py."""
    return Table(board.words, DELIVERIES // 8, DELIVERY_ROWS)


def open_files(board: Board) -> OpenFiles:
    """The table of open files, read now."""
    return OpenFiles(Table(board.words, FILES // 8, FILE_ROWS))


def _open_file(ino: int, value: int) -> OpenFile:
    return OpenFile(ino, value & 0xFFFFFFFF, value >> 32)


def init_request(board: Board) -> bytes:
    """The kernel's INIT request with its header; empty before it came."""
    return bytes(board.words.cast("B")[INIT : INIT + board.init_len])


def keep_init(board: Board, request: bytes) -> None:
    """Keep the kernel's INIT request for later workers. Raises ValueError when it is too long."""
    if len(request) > INIT_MAX:
        raise ValueError(f"an INIT request of {len(request)} bytes is longer than {INIT_MAX}")
    board.words.cast("B")[INIT : INIT + len(request)] = request
    board.init_len = len(request)
