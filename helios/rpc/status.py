"""Which gRPC status every error has. Their names are gRPC's, as text, so that nothing here needs the library."""

from __future__ import annotations

from collections.abc import Mapping
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

STATUS: Final[Mapping[type[HeliosError], str]] = {
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


def status_of(error: HeliosError, known: Mapping[type[HeliosError], str] = STATUS) -> str:
    """The name of the gRPC status that an error is answered with: its own class', or the nearest above."""
    return next(known[kind] for kind in type(error).__mro__ if kind in known)
