"""How many requests of a model a router takes, as those say who say which workers it has (``limits`` of an
InferenceService, docs/router-discovery.md). No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Limits:
    """``in_flight``: requests that are answered at the same time; ``queued``: requests that wait. None: any number."""

    in_flight: int | None = None
    queued: int | None = None


UNLIMITED: Final = Limits()


def least(said: Iterable[Limits]) -> Limits:
    """What holds where several say it: while it changes from one to another, some say the old."""
    found = [one for one in said if one != UNLIMITED]
    if not found:
        return UNLIMITED
    in_flight = [one.in_flight for one in found if one.in_flight is not None]
    queued = [one.queued for one in found if one.queued is not None]
    return Limits(min(in_flight, default=None), min(queued, default=None))
