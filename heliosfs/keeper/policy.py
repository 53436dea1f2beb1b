"""What the keeper decides about workers, without doing any of it. Times are seconds of one monotonic clock."""

from __future__ import annotations

import signal
from enum import Enum
from typing import Final

from heliosfs.keeper.board import Board

FIRST_DELAY_S: Final = 0.1
LONGEST_DELAY_S: Final = 5.0
HEALTHY_S: Final = 10.0
"""A worker that served this long ends the growth of the delay."""


class Death(Enum):
    """How a worker ended."""

    ASKED = "by us, and not because it hung"
    CLEAN = "it said so, or exit status 0"
    KILLED = "SIGKILL or SIGTERM from outside"
    CRASH = "anything else, or replaced because it hung; counts against the requests that were pending"


def death(
    code: int | None, *, asked: bool = False, hung: bool = False, ended: bool = False, oom: bool = False
) -> Death:
    """Name an end. ``code``: exit status, -n for signal n, None when only its parent knows.

    ``ended``: it said that it would. ``oom``: a process was killed for want of memory just then, most likely this one.
    """
    if hung:
        return Death.CRASH
    if asked:
        return Death.ASKED
    if code == 0 or ended:
        return Death.CLEAN
    if code == -signal.SIGTERM or (code == -signal.SIGKILL and not oom):
        return Death.KILLED
    return Death.CRASH


class Restarts:
    """How soon the next worker starts: at once after one that served, later and later after those that fail."""

    def __init__(self) -> None:
        self._failures = 0

    def died(self, how: Death, served_s: float | None) -> float:
        """The delay after a death, in seconds; ``served_s``: how long it was ready, None for never."""
        if served_s is not None and served_s >= HEALTHY_S:
            self._failures = 0
        if how is Death.ASKED or (served_s is not None and how is not Death.CRASH):
            return 0.0
        if how is Death.KILLED:  # whoever kills workers at their start does not lengthen the delay
            return FIRST_DELAY_S
        self._failures += 1
        return 0.0 if self._failures == 1 else min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._failures - 2, 10))


def hang(board: Board, now: float, since: float, stall_s: float) -> str | None:
    """Why a worker that is ready since ``since`` must be replaced; None if it need not."""
    for name, then_ns in (("loop", board.loop_ns), ("channel", board.channel_ns)):
        silent = now - max(then_ns / 1e9, since)
        if silent > stall_s:
            return f"its {name} gave no sign of life for {silent:.1f} s"
    age = overdue(board, now, since)
    return f"a request has waited for {age:.1f} s" if age else None


def overdue(board: Board, now: float, since: float) -> float:
    """How old the oldest request is, in seconds, if that is too much; else 0."""
    oldest_ns, limit_ns = board.oldest_ns, board.limit_ns
    age = now - max(oldest_ns / 1e9, since)
    return age if oldest_ns and limit_ns and age > limit_ns / 1e9 else 0.0
