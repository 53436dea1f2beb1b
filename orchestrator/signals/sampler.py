"""What the scaling policy goes by, from what was collected: one sample of a model's role."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from orchestrator.scaling.signals import UNHEARD, Signals, WorkerSignals
from orchestrator.signals.collector import Collector
from orchestrator.signals.window import weighted

PART: Final = 0.95
"""The part of requests, or tokens, that objectives are about."""


class Sampler:
    """Samples of the models of these ``names`` and of one role ("" of all); it remembers what the last one counted."""

    def __init__(self, collector: Collector, names: Collection[str], role: str = "") -> None:
        self._collector, self._names, self._role = collector, names, role
        self._requests: int | None = None

    def sample(self, replicas: int, ready: int) -> Signals:
        """``replicas``, ``ready``: as the cluster has them."""
        load = self._collector.load(self._names, self._role)
        if load is None:
            return Signals(replicas=replicas, ready=ready, router_age_s=UNHEARD, latency_age_s=UNHEARD, partial=True)
        requests = self._collector.requests(self._names)
        came, self._requests = None if self._requests is None else max(0, requests - self._requests), requests
        workers = tuple(
            WorkerSignals(kv_usage=one.kv_usage, running=one.running, waiting=one.waiting, age_s=one.age_s + load.age_s)
            for one in load.readings
        )
        gaps = ((one.token_s, one.tokens) for one in load.readings if one.token_s is not None)
        return Signals(
            replicas=replicas, ready=ready, held=load.held, held_tokens=load.held_tokens, in_flight=load.in_flight,
            in_flight_tokens=load.tokens, arrivals=came, router_age_s=load.age_s, partial=load.partial,
            workers=workers, ttft_s=self._collector.outcomes(self._names).first_token_s(PART),
            itl_s=weighted(gaps, PART), latency_age_s=load.age_s,
        )  # fmt: skip
