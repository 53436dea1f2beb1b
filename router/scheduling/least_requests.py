"""Scorer ``least-requests``: the fewest requests in flight for its share, as the router counts them itself.

The least busy has 1; one twice as busy 1/2. The request that is to be placed counts too, so an idle worker is not
infinitely better than one with a request.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.scheduling.request import Request
from router.worker import Worker


class LeastRequests:
    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        loads = [(worker.load.requests + 1) / worker.share for worker in candidates]
        least = min(loads)
        return [least / load for load in loads]
