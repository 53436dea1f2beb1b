"""Conditions of a status, as Kubernetes' API conventions have them. No I/O, no clock.

Source: metav1.Condition in the API conventions (sig-architecture/api-conventions.md, "Typical status properties"):
``lastTransitionTime`` is when ``status`` changed last, not when reason or message did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from orchestrator.api.common import Condition

__all__ = ["Condition", "conditions", "timestamp"]


def timestamp(now: float) -> str:
    """Unix seconds as metav1.Time has them: whole seconds in UTC."""
    return datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def conditions(
    before: Iterable[Mapping[str, Any]] | None, wanted: Sequence[Condition], now: float, generation: int
) -> list[dict[str, Any]]:
    """``wanted`` as a status has it: with the time since when each has its status, taken from ``before`` where it has
    not changed. Conditions that are not wanted any more are left out."""
    known = {one.get("type"): one for one in before or ()}
    found = []
    for one in wanted:
        last = known.get(one.type)
        same = last is not None and last.get("status") == one.status and last.get("lastTransitionTime")
        found.append({
            "type": one.type, "status": one.status, "reason": one.reason, "message": one.message,
            "observedGeneration": generation,
            "lastTransitionTime": last["lastTransitionTime"] if last is not None and same else timestamp(now),
        })  # fmt: skip
    return found
