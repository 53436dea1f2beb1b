"""Filter ``canary``: requests are divided between revisions of a model by weights.

What belongs together (a session, prompts that begin alike) stays with one revision: it is placed on a line that the
revisions divide, in the order in which they are written, so a change of the weights moves only those at the border.
A request without either falls anywhere. A revision without a worker leaves its part to the others; one that is not
written gets nothing while a written one can; for models that serve none of them nothing changes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from router.scheduling.keys import fraction_of
from router.scheduling.request import Request
from router.worker import Worker


class Canary:
    """``weights``: revision to weight, in order; ``header``, ``field``, ``chars``: as for session affinity."""

    def __init__(self, weights: Mapping[str, float], header: bytes, field: str, chars: int, rng: random.Random) -> None:
        self._weights, self._rng = dict(weights), rng
        self._header, self._field, self._chars = header, field, chars

    def keep(self, request: Request, candidates: Sequence[Worker]) -> Sequence[Worker]:
        there = {worker.revision for worker in candidates}
        able = {revision: weight for revision, weight in self._weights.items() if revision in there and weight > 0}
        if not able:
            return candidates
        revision = self._choose(request, able) if len(able) > 1 else next(iter(able))
        return [worker for worker in candidates if worker.revision == revision]

    def _choose(self, request: Request, able: Mapping[str, float]) -> str:
        key = request.session_key(self._header, self._field)
        if key is None:
            key = request.prefix_key(self._chars)
        at = (self._rng.random() if key is None else fraction_of(key)) * sum(able.values())
        for revision, weight in able.items():
            at -= weight
            if at < 0:
                return revision
        return revision
