"""Scorer ``queue-depth``: the fewest requests that wait inside the worker, as its own metrics say.

The metrics are late, so what the router has sent since the reading is added: else all requests between two readings
would go to one worker. Where the reading is too old the queue is unknown and taken to be the mean of the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.scheduling.request import Request
from router.worker import Worker


class QueueDepth:
    def __init__(self, now: Callable[[], float], max_age_s: float) -> None:
        self._now, self._max_age_s = now, max_age_s

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        oldest = self._now() - self._max_age_s
        depths = [_depth(worker, oldest) for worker in candidates]
        known = [one for one in depths if one is not None]
        if not known:
            return [1.0] * len(candidates)
        mean = sum(known) / len(known)
        loads = [
            ((mean if one is None else one) + 1) / worker.share for one, worker in zip(depths, candidates, strict=True)
        ]
        least = min(loads)
        return [least / load for load in loads]


def depth(worker: Worker, now: float, max_age_s: float) -> float | None:
    """Requests that wait at the worker; None where that is not known."""
    return _depth(worker, now - max_age_s)


def _depth(worker: Worker, oldest: float) -> float | None:
    metrics = worker.metrics
    if metrics is None or metrics.at < oldest:
        return None
    since = worker.load.requests - metrics.sent
    return metrics.waiting + since if since > 0 else metrics.waiting
