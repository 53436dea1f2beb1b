"""Scorer ``lora-affinity``: a request for a LoRA adapter goes where the adapter is in use.

The tiers of the Gateway API inference extension's scorer: 1 where the adapter is in a batch, 0.8 where one more fits,
0.6 where the adapter waits for a place, 0 where the places are taken by others. What is in use is what the router has
sent there itself, and what the worker's metrics say while they are fresh; without them a place is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.scheduling.request import Request
from router.worker import Worker


class LoraAffinity:
    def __init__(self, now: Callable[[], float], max_age_s: float) -> None:
        self._now, self._max_age_s = now, max_age_s

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        adapter = request.adapter
        if adapter is None:
            return [1.0] * len(candidates)
        now = self._now()
        return [self._grade(adapter, worker, now) for worker in candidates]

    def _grade(self, adapter: str, worker: Worker, now: float) -> float:
        sent = worker.adapters_in_flight
        metrics = worker.fresh_metrics(now, self._max_age_s)
        if adapter in sent or (metrics is not None and adapter in metrics.adapters_running):
            return 1.0
        if metrics is None or not metrics.adapters_max:
            return 0.8
        if len(metrics.adapters_running | metrics.adapters_waiting | sent.keys()) < metrics.adapters_max:
            return 0.8
        return 0.6 if adapter in metrics.adapters_waiting else 0.0
