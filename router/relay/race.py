"""The second attempt at one request: when it is made, and which of the two counts.

Only a request that may be hedged (``router.resilience.hedging``) has a ``Race``. Its ``Exchange`` drives it, and a
timer of its own, since the relay's tenth of a second is long beside what is waited for here. Of two attempts the one
whose answer begins first counts, but for errors: one of the second attempt, or one that says that the first one's
worker can't serve now, leaves the other to go on alone, so that no client gets an error that it would not have got
without. The one that lost is given up at once, which its worker sees, and which is no failure of it.

An attempt at such a request hands its answer's head on with the first byte (``Begun``): vLLM sends the head of a stream
at once, long before the first token, and a head that was passed on can't be taken back. A comment that keeps a stream
alive is passed on like any byte, and decides the race: what stands between the client and us waits for it.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

from router.relay.framing import Head

if TYPE_CHECKING:
    from router.relay.course import Course
    from router.relay.dispatch import Dispatch
    from router.relay.relay import Relay, Timer
    from router.resilience.hedging import Hedge, Hedges

log = logging.getLogger("helios.router")


class Race:
    """One request's. ``first`` and ``second``: its attempts, while they are under way and neither has won."""

    __slots__ = (
        "_course", "_hedge", "_model", "_path", "_raced", "_relay", "_streamed", "_timer", "first", "second",
    )  # fmt: skip

    def __init__(self, relay: Relay, course: Course, hedge: Hedge, streamed: bool) -> None:
        self._relay, self._course, self._hedge = relay, course, hedge
        self._model, self._path, self._streamed = course.model, course.said.route.path, streamed
        self._timer: Timer | None = None
        self._raced = False
        """Whether its time has come: there is one second attempt at most."""
        self.first: Dispatch | None = None
        self.second: Dispatch | None = None
        hedge.request()

    def begins(self, first: Dispatch) -> None:
        """The first attempt is made, or one in its place after a failure."""
        self.first, first.race = first, self
        delay_s = None if self._raced else self._hedge.delay_s(self._path, self._streamed)
        if delay_s is not None:
            self._timer = self._relay.later(delay_s, self._due)

    def _due(self) -> None:
        """The request is late."""
        self._timer, self._raced = None, True
        first, relay = self.first, self._relay
        if first is None or not first.silent:
            return
        worker = self._course.beside(first, self._hedge)
        if worker is None:
            return
        second = self.second = first.beside(worker)
        second.race = self
        extra = {
            "worker": first.to.url, "to": worker.url, "waited_s": round(relay.now() - first.sent_at, 3),
            "to_span_id": second.trace.span.decode(), **self._course.said.ids,
        }  # fmt: skip
        log.info("a late request goes to a second worker as well", extra=extra)
        second.begin()

    # --- what becomes of them ---

    def other(self, leg: Dispatch | None) -> Dispatch | None:
        """The one that is under way beside this one."""
        return self.second if leg is self.first else self.first

    def loses(self, leg: Dispatch, status: int) -> bool:
        """Whether an answer with this status does not count, since another attempt goes on."""
        if status < 400 or self.other(leg) is None:
            return False
        return leg is self.second or status >= 500 or status == HTTPStatus.TOO_MANY_REQUESTS

    def goes_on(self, leg: Dispatch) -> Dispatch | None:
        """Give this one up for another that goes on, which is returned; None: there is none, and this one stays."""
        other = self.other(leg)
        if other is not None:
            self.without(leg)
            self._course.tried(leg)
            leg.end()
        return other

    def without(self, leg: Dispatch) -> None:
        """This one is over, and had no answer that counts."""
        self._stop()
        if leg is self.first:
            self.first = None
        elif leg is self.second:
            self.second = None
            self._tell("failed")

    def won(self, leg: Dispatch, status: int) -> None:
        """This one's answer is passed on: give the other up."""
        self._stop()
        first, second = self.first, self.second
        self.first = self.second = None
        if first is not None and (leg is second or status == HTTPStatus.OK):
            self._hedge.took(self._path, self._streamed, self._relay.now() - first.sent_at)
        if second is None:
            return
        self._tell("won" if leg is second else "lost")
        if leg is first:
            second.lost()
            second.end()
        elif first is not None:
            first.overtaken()
            first.end()

    def over(self) -> None:
        """The request is; neither has won where there are two."""
        self._stop()
        first, second = self.first, self.second
        self.first = self.second = None
        if second is not None:
            self._tell("gone")
            second.end()
        if first is not None:
            first.end()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self, result: str) -> None:
        self._relay.metrics.hedges.labels(self._model, result).inc()


def race_of(relay: Relay, course: Course, hedges: Hedges) -> Race | None:
    """What a request has that may be hedged, when its first attempt is made."""
    request, hedge = course.request, hedges.of(course.model, course.said.route)
    return None if request is None or hedge is None else Race(relay, course, hedge, request.stream)


class Begun:
    """Hands an attempt's answer on from its first byte, or its end; errors from their heads."""

    __slots__ = ("_head", "_to")

    def __init__(self, to: Dispatch) -> None:
        self._to = to
        self._head: Head | None = None

    def came(self, head: Head | None, piece: bytes, ended: bool) -> None:
        if head is None:
            head, self._head = self._head, None
        if head is not None and not piece and not ended and head.status < 400:
            self._head = head
        else:
            self._to.came(head, piece, ended)

    def malformed(self, reason: str) -> None:
        self._to.malformed(reason)

    def broke(self, reason: str, stale: bool) -> None:
        self._to.broke(reason, stale)
