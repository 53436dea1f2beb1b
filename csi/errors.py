"""Errors of the driver's own, and which gRPC status every error has (CSI specification 1.12, "Error Scheme").

The names of the statuses are gRPC's, as text, so that nothing here needs the library.
"""

from __future__ import annotations

from typing import Final

from helios.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    HeliosError,
    IntegrityError,
    InvalidInput,
    NoSpace,
    NotFound,
    Retired,
    Unauthorized,
    Unavailable,
)


class Pending(HeliosError):
    """Another call about the same volume or target is not done yet."""

    code = "Pending"


class Precondition(HeliosError):
    """What is there keeps the call from being done, until somebody changes it."""

    code = "Precondition"


class OutOfRange(HeliosError):
    """A capacity that the model does not fit into."""

    code = "OutOfRange"


STATUS: Final[dict[type[HeliosError], str]] = {
    Pending: "ABORTED",
    Precondition: "FAILED_PRECONDITION",
    OutOfRange: "OUT_OF_RANGE",
    InvalidInput: "INVALID_ARGUMENT",
    NotFound: "NOT_FOUND",
    Retired: "FAILED_PRECONDITION",
    Conflict: "ALREADY_EXISTS",
    Unauthorized: "UNAUTHENTICATED",
    Forbidden: "PERMISSION_DENIED",
    IntegrityError: "INTERNAL",
    DeadlineExceeded: "DEADLINE_EXCEEDED",
    Unavailable: "UNAVAILABLE",
    NoSpace: "RESOURCE_EXHAUSTED",
    HeliosError: "INTERNAL",
}


def status_of(error: HeliosError) -> str:
    """The name of the gRPC status that an error is answered with: its own class', or the nearest above."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
