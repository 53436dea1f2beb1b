"""One request's blocks, from the question whether another worker computes them to the request that takes them.

    SEQUENTIAL      WANTED -> PREFILLING -> READY -> TAKEN
    CONCURRENT      WANTED -> PAIRED -> READY or TAKEN
    STORAGE_FIRST   WANTED -> PROBING -> TAKEN, or WANTED -> PREFILLING -> READY
    all             PREFILLING, PAIRED -> LOCAL, or WANTED where a decode worker can't compute the prompt itself

PREFILLING: a worker computes the prompt, and nobody else has the request. PAIRED: both workers have it, or the decode
worker will as soon as there is a connection; what it answers is held until the other one has succeeded, and not taken
where that fails. PROBING: the decode worker was asked whether it has enough.

No I/O, and the clock is injected. Whoever computed the blocks keeps them for ``lease_s``, and whoever comes later may
read what somebody else's blocks are by then, which nobody notices (aws-samples/aws-do-eks#84): so what is older than
``SHARE`` of that is not taken, but computed anew, ``MOST`` times in all; then the worker that answers computes it
itself. What was taken is never taken again: the first reader's end gives the blocks free. In a storage that ``keeps``
them they can be read by whoever comes.

A request may be at two workers (hedging), and only one of these attempts has to do with its blocks: the one that has
the ``ticket`` of the last ``begin`` or ``probe``. What others say is about what was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from typing import Final

from router.disaggregation.bodies import Document, Values, for_decode, for_prefill, with_fields
from router.disaggregation.cached import corrected
from router.disaggregation.connectors import THRESHOLD, Connector, Shape
from router.errors import ApiError
from router.relay.upstream import Taker

SHARE: Final = 0.8
"""The part of a lease in which blocks are taken."""
MOST: Final = 2
"""Times that the prompt of a request is computed elsewhere."""
NO_TICKET: Final = 0


class State(Enum):
    WANTED = 0
    PREFILLING = 1
    READY = 2
    TAKEN = 3
    LOCAL = 4
    PAIRED = 5
    PROBING = 6


WANTED, PREFILLING, READY, TAKEN, LOCAL, PAIRED, PROBING = State


class Transfer:
    """One request's. ``revision``: that of the worker which computes; only one of the same may take the blocks."""

    __slots__ = (
        "_bits", "_connector", "_document", "_lease_s", "_now", "_path", "_probed", "_ready_at", "_sent", "_threshold",
        "_times", "_values", "cached", "identity", "refusal", "revision", "state", "ticket",
    )  # fmt: skip

    def __init__(
        self, path: str, document: Document, connector: Connector, lease_s: float, now: Callable[[], float],
        bits: Callable[[int], int], threshold: float = 0.0,
    ) -> None:  # fmt: skip
        """``now``: the clock, in seconds; ``bits``: random ones; ``threshold``: the part of a prompt, 0 to 1, that is
        cached where a probe succeeds."""
        self._path, self._document, self._connector = path, document, connector
        self._lease_s, self._now, self._bits, self._threshold = lease_s, now, bits, threshold
        self._values: Values = {}
        self._ready_at = 0.0
        self._times = 0
        self._sent = self._probed = False
        self.state = WANTED
        self.ticket = NO_TICKET
        self.revision = ""
        self.identity = b""
        """What the request is called at both workers; empty: as ever."""
        self.cached: int | None = None
        """Tokens of the prompt that the one who computed it had cached before; None: it does not say."""
        self.refusal: ApiError | None = None
        """What a client is told since its request is wrong, where no other worker could say so."""

    @property
    def busy(self) -> bool:
        """Whether a worker is computing the prompt, or asked whether it has it."""
        return self.state is PREFILLING or self.state is PAIRED or self.state is PROBING

    @property
    def paired(self) -> bool:
        """Whether both workers have the request."""
        return self.state is PAIRED

    @property
    def probing(self) -> bool:
        return self.state is PROBING

    @property
    def taken(self) -> bool:
        """Whether the worker that answers has what it was promised."""
        return self.state is TAKEN

    @property
    def wanted(self) -> bool:
        """Whether another worker may be asked to compute the prompt now."""
        return self.state is WANTED and self._times < MOST

    @property
    def to_probe(self) -> bool:
        """Whether the decode worker is to be asked first whether it has enough."""
        return self.state is WANTED and self._connector.shape is Shape.STORAGE_FIRST and not self._probed

    @property
    def undone(self) -> bool:
        """Whether it has to be looked anew who computes the prompt: its blocks are too old, or the worker can't."""
        return self.late or (self.state is WANTED and not self._connector.alone)

    # --- the worker that computes ---

    def begin(self, revision: str, peer: Values, identity: bytes) -> bytes:
        """A worker of this revision is asked: the body of the request to it.

        ``peer``: what is known of it; ``identity``: the request's. Raises KeyError where too little is known."""
        assert self.wanted, self.state
        concurrent = self._connector.shape is Shape.CONCURRENT
        self.state, self.revision = PAIRED if concurrent else PREFILLING, revision
        self._sent, self._times, self.ticket = False, self._times + 1, self.ticket + 1
        self.identity = identity + b"-%016x" % self._bits(64) if self._connector.own_ids else b""
        self._values = {
            **peer,
            "transfer_id": b'"xfer-%032x"' % self._bits(128),
            "room": b"%d" % (1 + self._bits(62)),
            "request_id": json.dumps((self.identity or identity).decode()).encode(),
        }
        return for_prefill(self._path, self._document, self._connector, self._values)

    def meets(self, peer: Values) -> None:
        """What is known of the worker since it has answered."""
        self._values = {**self._values, **peer}

    def ready(self, params: bytes, cached: int | None) -> None:
        """It has. ``params``: where the blocks are, JSON; empty where it doesn't say."""
        assert self.state is PREFILLING or self.state is PAIRED, self.state
        self.state = TAKEN if self.state is PAIRED and self._sent else READY
        self._values = {**self._values, "answer": params}
        self._ready_at, self.cached = self._now(), cached

    def failed(self, refusal: ApiError | None = None) -> None:
        """It has not, or not in time. ``refusal``: since the request is wrong."""
        assert self.state is PREFILLING or self.state is PAIRED, self.state
        self.state = LOCAL if self._connector.alone else WANTED
        if not self._connector.alone:
            self.refusal = refusal

    def given_up(self) -> None:
        """The worker that answers has refused the request, and the other one may wait for it for ever."""
        assert self.state is PAIRED, self.state
        self.state = TAKEN
        self._times -= 1  # it says nothing of the one that computes

    # --- the worker that answers ---

    def probe(self, revision: str) -> None:
        """It is asked first whether it has enough."""
        assert self.to_probe, self.state
        self.state, self.revision, self.ticket = PROBING, revision, self.ticket + 1

    def missed(self) -> None:
        """It has too little."""
        assert self.state is PROBING, self.state
        self.state, self._probed = WANTED, True

    def had(self) -> None:
        """It has enough, and answers."""
        assert self.state is PROBING, self.state
        self.state = TAKEN

    def fits(self, revision: str) -> bool:
        """Whether there are blocks that a worker of this revision may take now."""
        return self.state is READY and self.revision == revision and not self._old

    def take(self, ticket: int, revision: str) -> bytes:
        """The body for the worker that answers; empty: the client's own, since there is nothing to be taken."""
        if ticket != self.ticket:
            return b""
        if self.state is PROBING:
            return with_fields(self._path, self._document, self._connector, {THRESHOLD: self._threshold}, {})
        if self.state is PAIRED and not self._sent:
            self._sent = True
        elif not self.fits(revision):
            return b""
        elif not self._connector.keeps:
            self.state = TAKEN
        return for_decode(self._path, self._document, self._connector, self._values)

    def passing(self, to: Taker) -> Taker:
        """Takes the answer to what ``take`` gave, and hands it on, with the tokens that were cached before."""
        return to if self.cached is None else corrected(to, self._path, self.cached)

    def lost(self, ticket: int) -> bool:
        """The kept connection over which it was taken broke at once; whether that was all of it, so that the prompt has
        to be computed anew: the worker has most likely seen nothing, but a worker that had would be told the same
        twice, and wait for ever, or read what is somebody else's by then."""
        if ticket != self.ticket or (self.state is not PAIRED and self.state is not TAKEN):
            return False
        self.state = LOCAL
        self._times -= 1  # it says nothing of the one that computes
        return True

    def left(self, ticket: int) -> None:
        """The attempt is over. What it waited for isn't done for anybody any more."""
        if ticket != self.ticket or not self.busy:
            return
        if self.state is PAIRED and not self._sent:
            self._times -= 1  # the one that was to answer could not be reached, which says nothing of the other
        self.state = LOCAL

    def again(self) -> None:
        """The request goes to another worker, or it comes late: what was taken, is old or has failed counts no more."""
        assert not self.busy, self.state
        if self.state is WANTED:
            return
        if self.state is not READY or self._old:
            self.state, self._values, self.identity, self._probed = WANTED, {}, b"", False

    @property
    def late(self) -> bool:
        """Whether there are blocks that are too old."""
        return self.state is READY and self._old

    @property
    def _old(self) -> bool:
        return not self._connector.keeps and self._now() - self._ready_at > SHARE * self._lease_s
