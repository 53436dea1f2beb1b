"""What may be sent to a worker once more, and when.

A request that no worker can have begun may always go elsewhere: nothing was sent, or a worker said that it did not take
it (503, RFC 9110, 15.6.4; 429 where that is wanted). Where a worker may have begun, only what costs little twice and
leaves nothing behind is repeated (``InferenceRoute.repeatable``): generation is not, unless configured, since it would
be paid for twice and may be what killed the worker. 502 and 504 come from proxies before a worker, which may have it.
500 is an answer to this very request. No waiting: a retry goes to another worker, never to the same again.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from helios.config import RetrySettings
from router.routes import InferenceRoute


class Failure(Enum):
    """Why a request would be sent again; the value is the metrics' label."""

    NOT_TAKEN = "not_taken"
    LIMITED = "limited"
    GATEWAY = "gateway"
    BROKE = "broke"
    HUNG = "hung"


STATUSES: Final = {503: Failure.NOT_TAKEN, 429: Failure.LIMITED, 502: Failure.GATEWAY, 504: Failure.GATEWAY}


def repeatable(route: InferenceRoute, failure: Failure, settings: RetrySettings) -> bool:
    """Whether a request of the route may be sent again after the failure, before a byte of an answer was passed on."""
    if failure is Failure.NOT_TAKEN:
        return True
    if failure is Failure.LIMITED:
        return settings.retry_429
    return route.repeatable or settings.retry_generation
