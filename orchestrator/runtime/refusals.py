"""What an error of the API server means for a turn: what it is called, and when to try again. No I/O."""

from __future__ import annotations

from typing import Final

import msgspec

from helios.errors import HeliosError, Unavailable
from helios.kube.following import why
from helios.kube.reflector import Refused

QUOTA, FORBIDDEN, INVALID, CONFLICT, NOT_FOUND = "QuotaExceeded", "Forbidden", "Invalid", "Conflict", "NotFound"
NOT_OWNED, TOO_MANY, UNAVAILABLE, CONTESTED = "NotOwned", "TooManyRequests", "Unavailable", "Contested"

PATIENCE: Final = {CONFLICT: 3, TOO_MANY: 3, UNAVAILABLE: 3, NOT_FOUND: 2}
"""Failures in a row before one of these is told to reconcilers: most are over with the next try."""


class Failure(HeliosError):
    """An action that could not be performed. ``code`` is one of the reasons above."""

    retry_after_s: float | None = None
    """Not before so many seconds, as the server asks."""


class NotLeading(Unavailable):
    """This process may not write (any more): nothing was sent."""


class Kept(msgspec.Struct, frozen=True):
    """What is remembered of a failure while it lasts."""

    reason: str
    message: str
    since: float
    times: int

    @property
    def told(self) -> bool:
        return self.times >= PATIENCE.get(self.reason, 1)


def failure(what: str, error: Exception) -> Failure:
    """The failure that an error of a call is; ``what`` begins the sentence."""
    if not isinstance(error, Refused):
        return Failure(f"{what}: {why(error)}", code=UNAVAILABLE)
    found = Failure(f"{what}: {error.message}", code=_reason(error))
    found.retry_after_s = error.retry_after_s
    return found


def _reason(error: Refused) -> str:
    if error.status == 403:
        # The words of kubernetes.io/docs/concepts/policy/resource-quotas: quotas have no reason of their own.
        return QUOTA if "exceeded quota" in error.message else FORBIDDEN
    if error.status == 422 and "metadata.uid: Invalid value" in error.message:
        return CONFLICT  # another object has that name by now: an apply that names the old one's uid says it so
    return {
        400: INVALID, 401: FORBIDDEN, 404: NOT_FOUND, 409: CONFLICT, 413: INVALID, 422: INVALID, 429: TOO_MANY,
    }.get(error.status, UNAVAILABLE)  # fmt: skip
