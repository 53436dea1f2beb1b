"""How many replicas a load asks for, as a fraction: each measure beside what is aimed at, and the most of them.

In-flight requests first: utilisation is near 100% with one request and with a hundred. Held requests are load like
those in flight, so that the first jump from nothing has the size of the queue. What is not known is said, too.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from orchestrator.scaling.settings import ScalingSettings
from orchestrator.scaling.signals import Signals

LATE_MOST: Final = 1.5
"""By so much replicas are raised at most where an objective is missed, at a time."""
STRAIN_LEAST: Final = 0.25
"""So small the load that is aimed at gets at least, as a part of what is set: what misses its objective with even less
does not do so for want of replicas."""


class Load(NamedTuple):
    """``replicas``: what is asked for by all that is known; ``measure``: by which measure, for people."""

    replicas: float
    measure: str
    busy: bool
    """There are requests, or were since the last look."""
    unknown: str
    """What has to be known before anything is taken away and isn't; "": nothing."""
    strain: float


def measured(seen: Signals, settings: ScalingSettings, strain: float, settled: bool) -> Load:
    """``strain`` as in ``State``; ``settled``: nothing has been added that could still help against late tokens."""
    old = seen.router_age_s > settings.stale_s
    held = 0 if old or seen.held is None else seen.held
    flying = 0 if old or seen.in_flight is None else seen.in_flight
    unknown = ""
    if old or seen.held is None or seen.in_flight is None:
        unknown = "what routers hold and have under way"
    elif seen.partial:
        unknown = "what some router has"
    came = 0 if old or seen.arrivals is None else seen.arrivals
    busy = bool(held or flying or came)

    most, measure = _requests(held, flying, settings), f"{flying} requests in flight, {held} held"
    if settings.tokens_per_replica:
        if old or seen.held_tokens is None or seen.in_flight_tokens is None:
            unknown = unknown or "their tokens"
        else:
            tokens = seen.held_tokens + seen.in_flight_tokens
            most, measure = max((most, measure), (tokens / settings.tokens_per_replica, f"{tokens} tokens"))
    if seen.ready and (seen.workers or settings.kv_usage):
        by_workers, said, missing = _by_workers(seen, settings)
        most, measure = max((most, measure), (by_workers, said))
        unknown = unknown or missing
    strain, late = _strained(seen, settings, strain, most, settled)
    if strain < 1:
        most, measure = most / strain, f"{measure}, at {strain:.0%} of the load aimed at{late}"
    if busy:
        most = max(most * (1 + settings.extra_percent / 100) + settings.extra_replicas, 1e-3)
    return Load(most, measure, busy, unknown, strain)


def _requests(held: int, flying: int, settings: ScalingSettings) -> float:
    each = settings.in_flight_per_replica
    return flying / each + held / (settings.held_per_replica or each)


def _by_workers(seen: Signals, settings: ScalingSettings) -> tuple[float, str, str]:
    """What workers' own counts ask for: replicas, in words, and what of it is missing."""
    known = [one for one in seen.workers if one.age_s <= settings.stale_s]
    usages = [one.kv_usage for one in known if one.kv_usage is not None]
    requests = sum((one.running or 0) + (one.waiting or 0) for one in known)
    most, measure = requests / settings.in_flight_per_replica, f"{requests} requests at workers"
    missing = ""
    if settings.kv_usage:
        usage = sum(usages) / len(usages) if usages else 0.0
        by_cache = min(seen.ready, len(usages)) * usage / settings.kv_usage
        most, measure = max((most, measure), (by_cache, f"{usage:.0%} of KV caches in use"))
        missing = "" if len(usages) >= seen.ready else f"the KV caches of {seen.ready - len(usages)} workers"
    return most, measure, missing


def _strained(
    seen: Signals, settings: ScalingSettings, strain: float, replicas: float, settled: bool
) -> tuple[float, str]:
    """``strain`` after this sample: less where an objective is missed with the replicas that there are."""
    if seen.latency_age_s > settings.stale_s or not seen.ready or not replicas:
        return strain, ""
    pairs = ((seen.ttft_s, settings.ttft_s), (seen.itl_s, settings.itl_s))
    ratio = max((is_s / aimed_s for is_s, aimed_s in pairs if is_s is not None and aimed_s), default=0.0)
    if ratio <= 1 + settings.tolerance or not settled:
        return strain, ""
    wanted = max(seen.ready + 1.0, seen.ready * min(ratio, LATE_MOST))
    return max(STRAIN_LEAST, min(strain, replicas / wanted)), f" (latency {ratio:.1f} times its objective)"


def relaxed(seen: Signals, settings: ScalingSettings, strain: float, elapsed_s: float) -> float:
    """``strain`` some time later: forgotten bit by bit, unless an objective is nearly missed right now."""
    if strain >= 1:
        return 1.0
    near = any(
        is_s is not None and aimed_s and is_s > 0.7 * aimed_s
        for is_s, aimed_s in ((seen.ttft_s, settings.ttft_s), (seen.itl_s, settings.itl_s))
    )
    if near and seen.latency_age_s <= settings.stale_s:
        return strain
    left = 1 - (1 - strain) * math.exp(-elapsed_s / settings.latency_hold_s)
    return left if left < 0.99 else 1.0
