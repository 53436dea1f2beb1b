"""Scorer ``prefix-index``: as ``prefix-cache``, but what a worker has of the prompt is known, not guessed.

What is where comes from an index that the workers' KV events keep. A worker that it doesn't follow, and every worker
where the prompt's tokens could not be had in time, is graded by what was sent there (``prefix-cache``). So is one at
which prompts wait to be computed: what it will have when they are, it hasn't said yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.request import Request
from router.worker import Worker


class PrefixIndex(Protocol):
    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[int | None]:
        """For each candidate the number of the prompt's first tokens that its KV cache holds; None where unknown."""
        ...


class Asked:
    """What the index said before the request came to be scheduled."""

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[int | None]:
        cached = request.cached
        return [cached.get(worker.url) for worker in candidates]


class PrefixIndexScorer:
    """``cache`` has what was sent where."""

    def __init__(self, index: PrefixIndex, cache: PrefixCache) -> None:
        self._index, self._cache = index, cache

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        sent = self._cache.held(request)
        held = [
            _has(known, sent.get(worker.home, 0), worker)
            for worker, known in zip(candidates, self._index.score(request, candidates), strict=True)
        ]
        return self._cache.grade(request, candidates, held)

    def chosen(self, request: Request, worker: Worker) -> None:
        """The request goes there: remember it, and say how much of it has to be computed."""
        (known,) = self._index.score(request, (worker,))
        has = _has(known, self._cache.held(request).get(worker.home, 0), worker)
        self._cache.chosen(request, worker)
        request.prefill = max(0, request.prompt_tokens - has)


def _has(known: int | None, sent: int, worker: Worker) -> int:
    """What a worker has of a prompt, in tokens, or will have when it comes to this one."""
    if known is None:
        return sent
    return max(known, sent) if worker.load.prefill else known
