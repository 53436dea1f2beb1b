"""Scorer ``session-affinity``: requests of one session go to one worker.

A session is what the header names, else what the body's field names, else those whose prompts begin alike. Its owner is
found as for ``prefix-affinity``, but a session moves for load only when the worker has ``factor`` times its share.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.scheduling.hashing import owner
from router.scheduling.request import Request
from router.worker import Worker


class SessionAffinity:
    """``header`` is in lower case; ``field`` is one of the body's (``user``, …) or empty; ``chars`` as for prefixes."""

    def __init__(self, header: bytes, field: str, chars: int, factor: float, floor: int) -> None:
        self._header, self._field, self._chars = header, field, chars
        self._factor, self._floor = factor, floor

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        scores = [0.0] * len(candidates)
        key = request.session_key(self._header, self._field)
        if key is None and self._chars:
            key = request.prefix_key(self._chars)
        if key is not None:
            scores[owner(key, candidates, self._factor, self._floor)] = 1.0
        return scores
