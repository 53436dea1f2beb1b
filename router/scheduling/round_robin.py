"""Picker ``round-robin``: workers take turns, by their shares.

Stride scheduling (Waldspurger, 1995): each worker has the virtual time of its next turn, the earliest is taken, and its
time moves on by one over its share. A worker that was away, or is new, has its next turn now, not all those it missed.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.scheduling.best import best
from router.worker import Worker


class RoundRobin:
    def __init__(self) -> None:
        self._now = 0.0
        """The virtual time of the last turn."""

    def pick(self, candidates: Sequence[Worker], scores: Sequence[float] | None) -> Worker:
        now = self._now
        worker = min(best(candidates, scores), key=lambda one: (max(one.turn, now), one.dispatched_at))
        self._now = max(worker.turn, now)
        worker.turn = self._now + 1 / worker.share
        return worker
