"""Passive outlier detection: which workers are much worse than the others of their model.

Envoy's outlier detection (envoyproxy.io, arch_overview/upstream/outlier) with two measures: the median time to the
first byte, and the share of failures. Each worker is compared with the *others*: with their median of medians, which
one more bad worker among them does not move, and with their mean share of failures. Ejections last longer each time,
and never take more than a share of a model's workers: when many are slow it is the load, not the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helios.config import OutlierSettings


@dataclass(slots=True)
class Standing:
    """How a worker did over ``min_requests`` or more requests."""

    median_s: float | None
    """Median time to the first byte; None when there were too few."""
    failures: float
    """Share of failures, 0 to 1."""
    at: float
    """When the last of them was counted, in seconds of the caller's clock."""


def worst(peers: Sequence[Standing | None], now: float, settings: OutlierSettings) -> list[tuple[int, str]]:
    """Which of a model's workers are outliers, as (place in ``peers``, ``slow`` or ``failing``), worst first.

    ``peers``: all workers of the model, None where nothing is known. Only those that were counted ``now`` can be found;
    the others are there to compare with.
    """
    known = [one for one in peers if one is not None]
    if len(known) < 2:
        return []
    medians = sorted(one.median_s for one in known if one.median_s is not None)
    failures = sum(one.failures for one in known)
    found: list[tuple[float, int, str]] = []
    for place, one in enumerate(peers):
        if one is None or one.at != now:
            continue
        others = (failures - one.failures) / (len(known) - 1)
        if one.failures >= others + settings.failure_margin - 1e-9:
            found.append((1e9 + one.failures, place, "failing"))
        elif one.median_s is not None and len(medians) > 1:
            usual = _median_without(medians, one.median_s)
            if one.median_s >= max(usual * settings.slow_factor, usual + settings.slow_margin_s):
                found.append((one.median_s, place, "slow"))
    found.sort(reverse=True)
    return [(place, reason) for _, place, reason in found]


def room(workers: int, ejected: int, settings: OutlierSettings) -> bool:
    """Whether one more of a model's workers may be ejected."""
    return ejected + 1 <= workers * settings.max_share + 1e-9


def _median_without(ordered: Sequence[float], value: float) -> float:
    """The median of all but one of the values."""
    rest = list(ordered)
    rest.remove(value)
    middle = len(rest) // 2
    return rest[middle] if len(rest) % 2 else (rest[middle - 1] + rest[middle]) / 2
