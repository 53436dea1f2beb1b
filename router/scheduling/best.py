"""The candidates with the best score."""

from __future__ import annotations

from collections.abc import Sequence

from router.worker import Worker


def best(candidates: Sequence[Worker], scores: Sequence[float] | None) -> Sequence[Worker]:
    """Those that no other beats; all where nothing grades them."""
    if scores is None:
        return candidates
    highest = max(scores)
    if scores.count(highest) == 1:
        return (candidates[scores.index(highest)],)
    return [worker for worker, score in zip(candidates, scores, strict=True) if score == highest]
