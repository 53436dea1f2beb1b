"""Scorer ``least-tokens``: the fewest tokens in flight for its share; a long prompt weighs more than a short one.

Tokens are the estimates of ``request``. The least busy has 1; one twice as busy, this request included, 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.scheduling.request import Request
from router.worker import Worker


class LeastTokens:
    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        own = max(1, request.tokens)
        loads = [(worker.load.tokens + own) / worker.share for worker in candidates]
        least = min(loads)
        return [least / load for load in loads]
