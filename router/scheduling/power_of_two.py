"""Picker ``power-of-two``: of two drawn at random the one with the better score, else with fewer requests.

Mitzenmacher, "The power of two choices in randomized load balancing" (2001): almost as even as looking at all, and
several routers that know little of each other do not all run to the same worker.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from router.scheduling.max_score import busy
from router.worker import Worker


class PowerOfTwo:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, candidates: Sequence[Worker], scores: Sequence[float] | None) -> Worker:
        count = len(candidates)
        if count == 1:
            return candidates[0]
        one = int(self._rng.random() * count)
        other = int(self._rng.random() * (count - 1))
        other += other >= one
        if scores is not None and scores[one] != scores[other]:
            return candidates[one if scores[one] > scores[other] else other]
        return min(candidates[one], candidates[other], key=busy)
