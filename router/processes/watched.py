"""A worker's row as it is seen by who only looks: the control process, which hears of workers before anybody else.

It has no part in deciding when a row is given up, so the place that a name had may be another's by now, or the name may
have another. What is read here is read where the name is at that moment; of a name without a row everything is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from router.processes.board import Board, Row

NOTHING: Final = "nothing of a worker is counted or decided by who only watches it"


class Watched:
    """A ``router.load.Load`` and a ``router.resilience.cells.Cells`` to be read only."""

    __slots__ = ("_board", "_name", "_row")

    def __init__(self, board: Board, name: str) -> None:
        self._board, self._name = board, name
        self._row: Row | None = None

    def _now(self) -> Row:
        if self._row is None or not self._board.holds(self._row, self._name):
            self._row = self._board.find(self._name)
        return self._board.nobody if self._row is None else self._row

    @property
    def requests(self) -> int:
        return self._now().requests

    @property
    def tokens(self) -> int:
        return self._now().tokens

    @property
    def prefill(self) -> int:
        return self._now().prefill

    @property
    def ints(self) -> memoryview[int]:
        return self._now().ints

    @property
    def floats(self) -> memoryview[float]:
        return self._now().floats

    def mine(self, column: int) -> int:
        return 0

    def every(self, column: int) -> Iterable[int]:
        return self._now().every(column)

    def begin(self, tokens: int) -> None:
        raise NotImplementedError(NOTHING)

    def end(self, tokens: int) -> None:
        raise NotImplementedError(NOTHING)

    def wait(self, prefill: int) -> None:
        raise NotImplementedError(NOTHING)

    def put(self, column: int, value: int) -> None:
        raise NotImplementedError(NOTHING)

    def note(self) -> None:
        raise NotImplementedError(NOTHING)
