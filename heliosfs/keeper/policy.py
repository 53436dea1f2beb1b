"""What the keeper decides about workers, without doing any of it. Times are seconds of one monotonic clock."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from heliosfs.keeper.board import Board

FIRST_DELAY_S: Final = 0.1
LONGEST_DELAY_S: Final = 5.0
HEALTHY_S: Final = 10.0
"""A worker that served this long ends the growth of the delay."""

QUICK_S: Final = 2.0
QUICK_DEATHS: Final = 5
"""That many kills in a row, each so soon after the start, are not somebody's doing: it is the memory limit."""


class Death(Enum):
    """How a worker ended."""

    ASKED = auto()  # by us, and not because it hung
    CLEAN = auto()  # exit status 0
    KILLED = auto()  # SIGKILL or SIGTERM from outside
    CRASH = auto()  # anything else, or replaced because it hung


def death(code: int | None, asked: bool, hung: bool) -> Death:
    """Name an end: ``code`` is the exit status, -n for signal n, None when only its parent knows: nobody is blamed."""
    if hung:
        return Death.CRASH
    if asked:
        return Death.ASKED
    if code == 0:
        return Death.CLEAN
    return Death.KILLED if code in (None, -signal.SIGKILL, -signal.SIGTERM) else Death.CRASH


@dataclass(frozen=True)
class Verdict:
    """``counts``: the death counts against the requests that were pending; the next worker starts in ``delay_s``."""

    counts: bool
    delay_s: float


class Restarts:
    """How soon the next worker starts: at once after one that served, later and later after those that fail."""

    def __init__(self) -> None:
        self._failures = self._quick = 0

    def died(self, how: Death, served_s: float | None) -> Verdict:
        """Judge a death; ``served_s``: how long it was ready, None for never."""
        if served_s is not None and served_s >= HEALTHY_S:
            self._failures = 0
        self._quick = self._quick + 1 if how is Death.KILLED and (served_s or 0.0) < QUICK_S else 0
        counts = how is Death.CRASH or self._quick >= QUICK_DEATHS
        if self._quick >= QUICK_DEATHS:
            self._quick = 0
        if how is Death.ASKED or (served_s is not None and not counts):
            return Verdict(counts, 0.0)
        if how is Death.KILLED and not counts:
            return Verdict(counts, FIRST_DELAY_S)
        self._failures += 1
        return Verdict(counts, _delay(self._failures))


def _delay(failures: int) -> float:
    """0 the first time, then 0.1 s doubling to 5 s."""
    return 0.0 if failures == 1 else min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(failures - 2, 10))


def hang(board: Board, now: float, since: float, stall_s: float) -> str | None:
    """Why a worker that is ready since ``since`` must be replaced; None if it need not."""
    for name, then_ns in (("loop", board.loop_ns), ("channel", board.channel_ns)):
        silent = now - max(then_ns / 1e9, since)
        if silent > stall_s:
            return f"its {name} gave no sign of life for {silent:.1f} s"
    oldest_ns, limit_ns = board.oldest_ns, board.limit_ns
    age = now - max(oldest_ns / 1e9, since)
    if oldest_ns and limit_ns and age > limit_ns / 1e9:
        return f"a request has waited for {age:.1f} s"
    return None
