"""How long a worker may take to end, in seconds. No I/O."""

from __future__ import annotations

from typing import Final

LATE_S: Final = 10
"""How long vLLM, told to end, goes on with requests that came in the last moment."""
GUARD_GRACE_S: Final = 8.0
"""How long the guard needs beyond the command's own grace."""


def grace_s(drain_s: float, stop_s: float) -> float:
    """What a pod's ``terminationGracePeriodSeconds`` has to cover (docs/worker.md, Draining)."""
    return drain_s + LATE_S + stop_s + GUARD_GRACE_S
