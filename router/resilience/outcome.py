"""How a dispatch to a worker ended."""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    """How a dispatch ended. ``well``: None where that says nothing about the worker. ``owed``: it owed a first byte."""

    SAYS_NOTHING = (0, None, False)
    """The client left, the router stops, a kept connection had been closed."""
    OWED = (1, None, True)
    """The client left before the first byte."""
    OK = (2, True, False)
    FAILED = (3, False, False)
    """No connection, a broken one, no HTTP, silence inside the answer, a status of failure."""
    TIMED_OUT = (4, False, True)
    """No first byte in time."""

    def __init__(self, number: int, well: bool | None, owed: bool) -> None:
        self.well, self.owed = well, owed
