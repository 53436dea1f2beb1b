"""Scorer ``prefix-affinity``: prompts that begin alike go to one worker, whose KV cache then has the beginning.

The key is the LoRA adapter and the prompt's first ``chars`` characters (``prompt``); its owner is found by rendezvous
hashing with bounded loads (``hashing``), as KubeAI does it with a ring. The owner has 1, others 0; a request without a
prompt has no owner. Nothing is remembered, so routers agree without talking, and nothing grows.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.scheduling.hashing import owner
from router.scheduling.request import Request
from router.worker import Worker


class PrefixAffinity:
    """``factor`` > 1: how much more than its share of the requests a worker may have; ``floor``: so many requests at a
    worker are never too many."""

    def __init__(self, chars: int, factor: float, floor: int) -> None:
        self._chars, self._factor, self._floor = chars, factor, floor

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        scores = [0.0] * len(candidates)
        key = request.prefix_key(self._chars)
        if key is not None:
            scores[owner(key, candidates, self._factor, self._floor)] = 1.0
        return scores
