"""What the processes of one router have in common, as one of them sees it."""

from __future__ import annotations

from typing import Protocol

from router.admission.sums import Sums
from router.load import Load
from router.resilience.cells import Cells
from router.scheduling.homes import Homes


class Shared(Protocol):
    """The memory that they share (``router.processes.board``)."""

    def load(self, url: str) -> Load:
        """What all have under way at a worker."""
        ...

    def standing(self, url: str) -> Cells:
        """What is held against a worker."""
        ...

    def endpoint(self, url: str) -> Cells:
        """What is held against a fallback's endpoint."""
        ...

    def sums(self, bucket: str) -> Sums | None:
        """What was taken of a bucket of the limits; None where there is no room for one more."""
        ...

    def homes(self, entries: int) -> Homes:
        """Where it is remembered which worker got which prompt."""
        ...

    @property
    def moment(self) -> int:
        """Another number than before when something is held against a worker since, or no more."""
        ...
