"""One request's blocks, from the question whether another worker computes them to the request that takes them.

    WANTED -> PREFILLING -> READY -> TAKEN
                  |           |
                  +-> LOCAL <-+

No I/O, and the clock is injected. Whoever computed the blocks keeps them for ``lease_s``, and whoever comes later may
read what somebody else's blocks are by then, which nobody notices (aws-samples/aws-do-eks#84): so what is older than
``SHARE`` of that is not taken, but computed anew, ``MOST`` times in all; then the worker that answers computes it
itself. What was taken is never taken again: the first reader's end gives the blocks free.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from router.disaggregation.bodies import Document, for_prefill, with_transfer
from router.disaggregation.cached import corrected
from router.disaggregation.connectors import Connector
from router.relay.upstream import Taker

SHARE: Final = 0.8
"""The part of a lease in which blocks are taken."""
MOST: Final = 2
"""Times that the prompt of a request is computed elsewhere."""


class State(Enum):
    WANTED = 0
    PREFILLING = 1
    READY = 2
    TAKEN = 3
    LOCAL = 4


WANTED, PREFILLING, READY, TAKEN, LOCAL = State


class Transfer:
    """One request's. ``revision``: that of the worker which computes; only one of the same may take the blocks."""

    __slots__ = (
        "_connector", "_document", "_lease_s", "_now", "_params", "_path", "_ready_at", "_times", "cached", "revision",
        "state",
    )  # fmt: skip

    def __init__(
        self, path: str, document: Document, connector: Connector, lease_s: float, now: Callable[[], float]
    ) -> None:
        """``now``: the clock, in seconds."""
        self._path, self._document, self._connector = path, document, connector
        self._lease_s, self._now = lease_s, now
        self._params = b""
        self._ready_at = 0.0
        self._times = 0
        self.state = WANTED
        self.revision = ""
        self.cached: int | None = None
        """Tokens of the prompt that the one who computed it had cached before; None: it does not say."""

    @property
    def busy(self) -> bool:
        """Whether a worker is computing the prompt."""
        return self.state is PREFILLING

    @property
    def wanted(self) -> bool:
        """Whether another worker may be asked to compute the prompt now."""
        return self.state is WANTED and self._times < MOST

    def begin(self, revision: str) -> bytes:
        """A worker of this revision is asked: the body of the request to it."""
        assert self.wanted, self.state
        self.state, self.revision = PREFILLING, revision
        self._times += 1
        return for_prefill(self._path, self._document, self._connector.prefill)

    def ready(self, params: bytes, cached: int | None) -> None:
        """It has. ``params``: where the blocks are, JSON."""
        assert self.state is PREFILLING, self.state
        self.state, self._params, self._ready_at, self.cached = READY, params, self._now(), cached

    def failed(self) -> None:
        """It has not, or not in time."""
        assert self.state is PREFILLING, self.state
        self.state = LOCAL

    def fits(self, revision: str) -> bool:
        """Whether there are blocks that a worker of this revision may take now."""
        return self.state is READY and self.revision == revision and not self._old

    def take(self, revision: str) -> bytes:
        """The body for the worker that answers, with the blocks; empty: the client's own, since there are none."""
        if not self.fits(revision):
            return b""
        self.state = TAKEN
        return with_transfer(self._document, self._params)

    def passing(self, to: Taker) -> Taker:
        """Takes the answer to what ``take`` gave, and hands it on, with the tokens that were cached before."""
        return to if self.cached is None else corrected(to, self._path, self.cached)

    def give_back(self) -> None:
        """Nobody has begun to read what was taken: the connection was stale."""
        if self.state is TAKEN:
            self.state = READY

    def again(self) -> None:
        """The request goes to another worker, or it comes late: what was taken, is old or has failed counts no more."""
        assert self.state is not PREFILLING
        if self.state is not READY or self._old:
            self.state, self._params = WANTED, b""

    @property
    def late(self) -> bool:
        """Whether there are blocks that are too old."""
        return self.state is READY and self._old

    @property
    def _old(self) -> bool:
        return self._now() - self._ready_at > SHARE * self._lease_s
