"""Picker ``random``: any, with a probability in proportion to its share and its score."""

from __future__ import annotations

import random
from collections.abc import Sequence

from router.worker import Worker


class RandomChoice:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, candidates: Sequence[Worker], scores: Sequence[float] | None) -> Worker:
        weights = [worker.share for worker in candidates]
        if scores is not None and max(scores) > 0:
            weights = [weight * score for weight, score in zip(weights, scores, strict=True)]
        elif min(weights) == max(weights):
            return candidates[int(self._rng.random() * len(candidates))]
        return self._rng.choices(candidates, weights)[0]
