"""Picker ``max-score``: the best; among equals the fewest requests for its share, then the one used longest ago.

The last makes an idle pool take turns, instead of one worker getting everything.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.scheduling.best import best
from router.worker import Worker


class MaxScore:
    def pick(self, candidates: Sequence[Worker], scores: Sequence[float] | None) -> Worker:
        return min(best(candidates, scores), key=busy)


def busy(worker: Worker) -> tuple[float, int]:
    """How busy a worker would be with one more request, for its share."""
    return (worker.load.requests + 1) / worker.share, worker.dispatched_at
