"""Least loaded: the worker with the fewest requests in flight; among equals the one dispatched to longest ago.

The tie-break makes an idle pool take turns, instead of one worker getting everything.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.workers import Worker


class LeastLoaded:
    """The policy ``least-loaded``; without state of its own."""

    def choose(self, candidates: Sequence[Worker]) -> Worker:
        return min(candidates, key=_load)


def _load(worker: Worker) -> tuple[int, int]:
    return worker.in_flight, worker.dispatched_at
