"""Errors of the driver's own, and which gRPC status every error has (CSI specification 1.12, "Error Scheme").

The names of the statuses are gRPC's, as text, so that nothing here needs the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from helios.errors import HeliosError
from helios.rpc import status as rpc


class Pending(HeliosError):
    """Another call about the same volume or target is not done yet."""

    code = "Pending"


class Precondition(HeliosError):
    """What is there keeps the call from being done, until somebody changes it."""

    code = "Precondition"


class OutOfRange(HeliosError):
    """A capacity that the model does not fit into."""

    code = "OutOfRange"


STATUS: Final[Mapping[type[HeliosError], str]] = {
    **rpc.STATUS,
    Pending: "ABORTED",
    Precondition: "FAILED_PRECONDITION",
    OutOfRange: "OUT_OF_RANGE",
}


def status_of(error: HeliosError) -> str:
    """The name of the gRPC status that an error is answered with: its own class', or the nearest above."""
    return rpc.status_of(error, STATUS)
