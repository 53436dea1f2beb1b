"""Filter ``unsaturated``: leaves out workers whose queue is long or whose KV cache is full.

By their own metrics while those are fresh, with what was sent since; what is not known is not saturated. Where all are
saturated the one with the shortest queue is left: whether to take the request at all is for admission to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.scheduling.queue_depth import depth
from router.scheduling.request import Request
from router.worker import Worker


class Unsaturated:
    def __init__(self, queue: int, kv_usage: float, now: Callable[[], float], max_age_s: float) -> None:
        self._queue, self._kv_usage, self._now, self._max_age_s = queue, kv_usage, now, max_age_s

    def keep(self, request: Request, candidates: Sequence[Worker]) -> Sequence[Worker]:
        now, age = self._now(), self._max_age_s
        kept = [worker for worker in candidates if not self._saturated(worker, now)]
        return kept or [min(candidates, key=lambda worker: depth(worker, now, age) or 0)]

    def _saturated(self, worker: Worker, now: float) -> bool:
        metrics = worker.fresh_metrics(now, self._max_age_s)
        if metrics is None:
            return False
        waiting = metrics.waiting and (depth(worker, now, self._max_age_s) or 0)
        return waiting >= self._queue or metrics.kv_usage >= self._kv_usage
