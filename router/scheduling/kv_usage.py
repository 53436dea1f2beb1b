"""Scorer ``kv-usage``: the most room in the KV cache, as the worker's own metrics say; 1 for an empty one.

Where the reading is too old the use is unknown and taken to be the mean of the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.scheduling.request import Request
from router.worker import Worker


class KvUsage:
    def __init__(self, now: Callable[[], float], max_age_s: float) -> None:
        self._now, self._max_age_s = now, max_age_s

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        now = self._now()
        readings = [worker.fresh_metrics(now, self._max_age_s) for worker in candidates]
        known = [one.kv_usage for one in readings if one is not None]
        mean = sum(known) / len(known) if known else 0.0
        return [1.0 - (mean if one is None else one.kv_usage) for one in readings]
