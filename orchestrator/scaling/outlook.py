"""What a forecast says of one model, and the replicas that follow from it."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from orchestrator.scaling.settings import ScalingSettings

STAYS: Final = 0.75
"""A replica stays for so much of the requests that it would be started for."""


class Company(msgspec.Struct, frozen=True):
    """How requests come together, beside requests that know nothing of one another (a Poisson process)."""

    alone: float = 1.0
    """Requests that come out of silence, as a part of those that would at such a rate."""
    along: float = 0.0
    """More requests a second right after one of them."""


class Expected(msgspec.Struct, frozen=True):
    """What is expected at some time."""

    work: float
    """Requests in flight at a time, with the margin."""
    rate: float
    """Requests a second."""
    company: Company = Company()


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """A forecast, as ``Forecast.outlook`` makes it."""

    soon: Expected
    """The most from now until a replica that is asked for now has long been ready."""
    later: Expected
    """The most until nodes that are told now have fetched the model, and replicas have started there."""
    trusted: bool = True
    """It has seen enough, and was lately better than to expect that all stays as it is."""
    why: str = ""
    """Why it isn't trusted."""


def replicas_for(expected: Expected, settings: ScalingSettings, startup_s: float, replicas: int) -> int:
    """Replicas for it, of which there are ``replicas``. Up to a whole one it is a matter of what that spares: the
    requests that would wake the model, and those that come while it starts (``worth_s``). One that is there stays a
    little longer than it would be started for."""
    by_work = math.ceil(expected.work / settings.in_flight_per_replica - 1e-9)
    if by_work <= 1:
        its = expected.company
        spared = expected.rate * its.alone * (1 + (expected.rate + its.along) * startup_s)
        by_work = 1 if spared * settings.forecast.worth_s >= (STAYS if replicas else 1) else 0
    return min(settings.max_replicas, by_work)
