"""Scorer ``latency``: the shortest wait for a first byte to be expected.

Finagle's peak EWMA balancer: what is expected is the recent time to a first byte (``router.latency``; streams and whole
answers apart) times the requests in flight, this one included, for the worker's share. One of which nothing is known,
or not for long, is taken to be as fast as the fastest, so it is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from router.scheduling.request import Request
from router.worker import Worker

UNKNOWN_S: Final = 1e-4
"""An estimate that has sunk below this says nothing any more."""


class Latency:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        now, kind = self._now(), request.stream
        times = [worker.first_byte[kind].value(now) for worker in candidates]
        fastest = min((time for time in times if time >= UNKNOWN_S), default=1.0)
        waits = [
            max(time, fastest) * (worker.load.requests + 1) / worker.share
            for time, worker in zip(times, candidates, strict=True)
        ]
        least = min(waits)
        return [least / wait for wait in waits]
