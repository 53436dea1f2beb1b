"""The boards as one process uses them: a ``router.shared.Shared``."""

from __future__ import annotations

import logging
import mmap

from router.admission.sums import Sums
from router.processes.board import Board, BoardError, Row
from router.processes.watched import Watched
from router.scheduling.homes import Homes, local

log = logging.getLogger("helios.router")


def worker_row(url: str) -> str:
    """The name of a worker's row on the board."""
    return f"worker {url}"


def _endpoint_row(url: str) -> str:
    """That of a fallback's endpoint; it stays, since there are as many as configurations have named."""
    return f"endpoint {url}"


class Sharing:
    """``board``: of the workers; ``limits``: of the buckets; ``slot``: this process's; ``homes``: memory for the table
    of who got which prompt; None: this process has one of its own."""

    def __init__(self, board: Board, limits: Board, slot: int, homes: mmap.mmap | None = None) -> None:
        self._board, self._limits, self._slot, self._homes = board, limits, slot, homes
        self._full = False

    def watched(self, url: str) -> Watched:
        """A worker's row for a process that begins nothing there."""
        return Watched(self._board, worker_row(url))

    def load(self, url: str) -> Row:
        return self._board.row(worker_row(url), self._slot)

    def standing(self, url: str) -> Row:
        return self._board.row(worker_row(url), self._slot)

    def endpoint(self, url: str) -> Row:
        return self._board.row(_endpoint_row(url), self._slot)

    def sums(self, bucket: str) -> Sums | None:
        try:
            row = self._limits.row(bucket, self._slot)
        except BoardError as error:
            if not self._full:
                self._full = True
                log.warning("limits of this process alone, which keeps a part of each", extra={"reason": error.message})
            return None
        return Sums(row.doubles(0), row.doubles(1), self._slot)

    def homes(self, entries: int) -> Homes:
        return local(entries) if self._homes is None else Homes(self._homes, entries)

    @property
    def moment(self) -> int:
        return self._board.moment
