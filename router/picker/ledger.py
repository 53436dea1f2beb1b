"""What is under way at workers where nobody here sees the end of it: a gateway was told a worker and left alone.

Each request counts at its worker from the choice on. It ends by what the worker says of itself: whenever there is a
reading of its metrics that shows fewer requests than the router had counted there, the requests that were begun
longest ago are over, as many as there were too many (by all processes of this router; of those each ends its share).
Vllm's requests take about equally long where they are many, and a count is all that is needed. Requests that other
routers send to the worker hide ends of ours, so each request ends after ``hold_s`` in any case.

No I/O, and the clock is given. Everything is one step in the event loop's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from helios.config import PickerSettings
from router.worker import Lease, Worker
from router.worker_metrics import WorkerMetrics

LAG_S: Final = 0.25
"""A request that was begun so shortly before a reading may not have been at the worker yet."""

Held = tuple[float, Lease]
"""A request, and since when it counts."""


def goes_by_metrics(settings: PickerSettings) -> bool:
    """Whether the workers' own metrics are needed."""
    return bool(settings.listen) and settings.response == "leave"


class Ledger:
    """``hold_s``: the longest time, in seconds; ``outlived`` hears of each request that has counted for so long, and
    ``freed`` of each that is over."""

    def __init__(self, hold_s: float, outlived: Callable[[], None], freed: Callable[[Worker], None]) -> None:
        self._hold_s, self._outlived, self._freed = hold_s, outlived, freed
        self._open: dict[Worker, deque[Held]] = {}
        self._read: dict[Worker, WorkerMetrics] = {}
        """The reading that was taken into account last."""

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def add(self, worker: Worker, now: float, lease: Lease) -> None:
        """A request that was counted at the worker just ``now`` is left to this, which ends it."""
        self._open.setdefault(worker, deque()).append((now, lease))

    def tick(self, now: float) -> None:
        """Some time has passed."""
        for worker in list(self._open):
            requests, metrics = self._open[worker], worker.metrics
            if metrics is not None and metrics is not self._read.get(worker):
                self._read[worker] = metrics
                self._end(worker, requests, _over(requests, metrics))
            while requests and now - requests[0][0] >= self._hold_s:
                self._outlived()
                self._end(worker, requests, 1)
            if not requests:
                del self._open[worker]
                self._read.pop(worker, None)

    def close(self) -> None:
        """End everything."""
        for worker, requests in list(self._open.items()):
            self._end(worker, requests, len(requests))
        self._open.clear()
        self._read.clear()

    def _end(self, worker: Worker, requests: deque[Held], count: int) -> None:
        for _ in range(count):
            requests.popleft()[1].end()
            self._freed(worker)


def _over(requests: deque[Held], metrics: WorkerMetrics) -> int:
    """How many of these the reading says are over."""
    begun = sum(1 for since, _ in requests if since <= metrics.at - LAG_S)
    excess = metrics.sent - metrics.running - metrics.waiting
    if excess <= 0 or not begun:
        return 0
    # Of what the router has there this process has a part; it ends that part of the excess, rounded up.
    return min(begun, -(-excess * len(requests) // max(metrics.sent, len(requests))))
