"""What a scheduling policy is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from router.workers import Worker


class Policy(Protocol):
    """Chooses one of the workers that can take a request.

    Called synchronously between filtering and dispatch: nothing happens between the choice and the moment it is
    counted, so a policy may rely on ``Worker.in_flight``.
    """

    def choose(self, candidates: Sequence[Worker]) -> Worker:
        """One of ``candidates``, which is never empty."""
        ...
