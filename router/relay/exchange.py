"""One request from its head to the end of its answer: a state machine that the two connections drive by calls.

    RECEIVING -> QUEUED -> DISPATCHED -> DONE

RECEIVING: the body is coming, or an earlier request of the connection is being answered. QUEUED (``queued``): admission
has not let it in yet, because no worker has room, or none is up, or a limit is being looked at elsewhere; or the index
of KV events is being asked. DISPATCHED: a worker has it, which is a ``Dispatch``, with deadlines of its own.

There is no task and no ``await`` in here: each call runs to its end in the event loop's thread. ``Dispatch.end`` gives
a worker back whatever happened there, and reports it once; ``end`` is the one way out. Where a request goes, and
whether it goes elsewhere after a failure, is ``course``'s to say; an error answer is held back until its head has said
whether it does. What the client has of its answer, and how one that breaks off ends, is in ``delivery``.
"""

from __future__ import annotations

import logging
import math
from enum import Enum
from typing import TYPE_CHECKING, Final

from router import errors
from router.descriptors import exhausted
from router.errors import ApiError
from router.relay.course import UNKNOWN, Course
from router.relay.delivery import Delivery
from router.relay.dispatch import Dispatch
from router.relay.framing import Head
from router.relay.headers import Headers
from router.relay.intake import Intake
from router.relay.queued import Queued
from router.relay.race import Race, race_of
from router.relay.request_head import RequestHead
from router.resilience.retry import Failure
from router.routes import InferenceRoute

if TYPE_CHECKING:
    from router.admission.entry import Entry
    from router.admission.rights import Principal
    from router.relay.client import Client
    from router.relay.relay import Relay

log = logging.getLogger("helios.router")

CLIENT_GONE: Final = 499
"""The metric label of the status when the client left before one was sent."""
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
NOT_SENT: Final = "not_sent"


class Phase(Enum):
    RECEIVING = 0
    QUEUED = 1
    DISPATCHED = 2
    DONE = 3


RECEIVING, QUEUED, DISPATCHED, DONE = Phase  # an attribute of an Enum takes as long to get as a method to call


class Exchange:
    """One request. ``deadline`` is when ``expire`` is due, in the loop's seconds."""

    __slots__ = (
        "_began", "_client", "_course", "_delivery", "_entry", "_error", "_expects", "_idle_s", "_intake", "_leg",
        "_phase", "_queued", "_race", "_relay", "_said", "_turn", "_urgent", "_whole", "deadline", "keep_alive",
    )  # fmt: skip

    def __init__(
        self, relay: Relay, client: Client, route: InferenceRoute, query: bytes, raw: Headers,
        *, http11: bool, keep_alive: bool, expects: bool, principal: Principal | None = None, urgent: bool = True,
    ) -> None:  # fmt: skip
        """``raw``: headers with lower-case names; ``expects``: the client waits for 100 before it sends the body;
        ``principal``: who asks, where that is known; None: the headers say; ``urgent``: somebody waits for it."""
        self._relay, self._client, self._urgent = relay, client, urgent
        self._expects, self.keep_alive = expects, keep_alive
        self._said = RequestHead(route, query, raw, relay.bits)
        self._phase = RECEIVING
        self._turn = self._whole = False
        self._delivery = Delivery(client, route.dialect, self._said.identity, http11)
        self._course = Course(relay, self._said)
        self._leg: Dispatch | None = None
        """The attempt that is under way..."""
        self._race: Race | None = None
        """...and what knows of a second one, where there may be one."""
        self._intake: Intake | None = None
        self._entry: Entry | None = None
        self._queued: Queued | None = None
        self._error: ApiError | None = None
        self._began = relay.now()
        self._idle_s = relay.settings.idle_timeout_s
        self.deadline = self._began + self._idle_s
        relay.active.add(self)
        try:
            if not query.isascii():
                raise errors.invalid_body("The URL's query holds bytes that are not ASCII.", "invalid_url")
            if relay.admission is not None:
                self._entry = self._delivery.entry = relay.admission.enter(route, raw, principal)
                self._queued = Queued(self, self._entry, self._delivery)
            self._intake = Intake(route, raw, relay.max_body, relay.budget)
        except ApiError as error:
            self.refuse(error)

    # --- the client's side ---

    @property
    def response_complete(self) -> bool:
        return self._phase is DONE

    @property
    def response_started(self) -> bool:
        """Whether the client has the head of the answer."""
        return bool(self._delivery.status)

    def begin(self) -> None:
        """What came before on the connection is answered."""
        self._turn = True
        if self._error is not None:
            self.fail(self._error)
        elif self._whole:
            self._admit()
        elif self._expects:
            self._client.transport.write(CONTINUE)

    def feed(self, piece: bytes) -> None:
        """The next bytes of the body."""
        if self._error is not None or self._phase is not RECEIVING or self._intake is None:
            return
        self.deadline = self._relay.now() + self._idle_s
        try:
            self._intake.feed(piece)
        except ApiError as error:
            self.refuse(error)
            return
        if self._intake.full:
            self._client.flow.pause_reading()
            self._intake.flush(self._flushed)

    def complete(self) -> None:
        """The body is whole."""
        self._whole = True
        intake = self._intake
        if self._error is not None or self._phase is not RECEIVING or intake is None or intake.writing:
            return
        try:
            intake.finish()
        except ApiError as error:
            self.refuse(error)
            return
        if self._turn:
            self._admit()
        else:
            self.deadline = math.inf  # its turn comes when the one before has ended, which has a deadline

    def _flushed(self, error: OSError | None) -> None:
        """A piece of the body is on disk."""
        if self._phase is DONE:
            return
        self._client.flow.resume_reading()
        if error is not None:
            self.refuse(errors.out_of_descriptors() if exhausted(error) else errors.no_space())
        elif self._whole:
            self.complete()

    def pause(self) -> None:
        """The client takes less than comes."""
        self._delivery.paused = True
        for leg in self._legs():
            leg.pause()

    def resume(self) -> None:
        self._delivery.paused = False
        for leg in self._legs():
            leg.resume()

    def gone(self) -> None:
        """The client has left."""
        for leg in self._legs():
            leg.abandon()
        self.end(gone=True)

    # --- what the relay says ---

    def expire(self) -> None:
        """The deadline has passed."""
        if self._phase is QUEUED:
            assert self._queued is not None
            self._queued.look()
        elif self._delivery.paused:
            self.not_taken()
        else:
            self.refuse(errors.body_timeout(self._idle_s))

    def cut(self) -> None:
        """The router's time is up."""
        self.refuse(errors.shutting_down())

    # --- what an attempt says ---

    def unreachable(self, leg: Dispatch, reason: str) -> None:
        """There was no connection."""
        leg.failed(NOT_SENT)
        self._course.unreachable(leg, reason)
        if not self._without(leg):
            self._course.once_more(leg, NOT_SENT, reason)
            self._leave()
            self.dispatch()

    def begins(self, leg: Dispatch, head: Head, piece: bytes) -> bool:
        """Pass an answer's head on, with what came of its body; False where the answer does not count."""
        race = self._race
        if race is not None and race.loses(leg, head.status):
            self._without(leg)
            return False
        failure = self._relay.resilience.failure_of(head.status)
        if failure is not None and self._again(leg, failure, f"it answered {head.status}"):
            return False
        if race is not None:
            self._leg = leg
            race.won(leg, head.status)
        assert self._intake is not None
        self._intake.release()
        self._course.answered(head)
        if self._entry is not None:
            self._entry.mark(head)
        try:
            self._delivery.begin(head, piece, self.keep_alive)
        except ApiError as error:
            self.fail(error)
            return False
        return True

    def failed(self, leg: Dispatch, failure: Failure | None, reason: str, error: ApiError) -> None:
        """It has no answer, or none that is whole. ``failure``: why it could be sent elsewhere; None: it can't."""
        leg.failed(error.code if failure is None else failure.value)
        if not self._without(leg) and (failure is None or not self._again(leg, failure, reason)):
            self.fail(error)

    def hung(self, leg: Dispatch) -> None:
        """Its worker generates nothing."""
        if self._without(leg):
            leg.failed(Failure.HUNG.value)
        else:
            self._again(leg, Failure.HUNG, "it generates nothing")

    def not_taken(self) -> None:
        """The client has taken nothing for too long."""
        log.warning("a client took nothing for too long", extra=self._said.ids)
        self._break_off()

    # --- on the way to a worker ---

    def _admit(self) -> None:
        """The request is whole and has its turn."""
        if self._course.spans is not None:
            self._course.spans.whole(self._relay.now())
        if self._queued is None:
            self.admitted()
            return
        assert self._intake is not None
        self._phase = QUEUED
        self._queued.admit(self._intake)

    def admitted(self) -> None:
        """It may go to a worker: ask what workers have of its prompt first, where the policy goes by that."""
        assert self._intake is not None
        if self._course.look_up(self._intake, self._looked_up):
            self._phase, self.deadline = QUEUED, math.inf  # the question has a deadline of its own
        else:
            self.dispatch()

    def _looked_up(self) -> None:
        """The index has answered, or its time is up."""
        if self._phase is not DONE:
            self.dispatch()

    def called(self) -> None:
        """Its turn in the queue has come."""
        self._course.wait_on()
        self.dispatch()

    def dispatch(self) -> None:
        """Send the request where it goes now."""
        assert self._intake is not None
        course = self._course
        try:
            to = course.choose(self._intake, self._entry)
        except ApiError as error:
            self.fail(error)
            return
        if to is None:
            assert self._queued is not None
            self._phase = QUEUED
            self._queued.wait()
            return
        self._phase, self.deadline = DISPATCHED, math.inf  # the attempt has one of its own
        leg = self._leg = Dispatch(self, self._relay, course, self._intake, self._delivery, to, course.place())
        hedges = self._relay.hedges
        # Who was told that he waits found all workers busy; who falls back found none.
        if hedges is not None and self._urgent and not (self._delivery.held or course.diverted):
            self._race = self._race or race_of(self._relay, course, hedges)
            if self._race is not None:
                self._race.begins(leg)
        leg.begin()

    def _again(self, leg: Dispatch, failure: Failure, reason: str) -> bool:
        """Send the request elsewhere, where that is safe, possible and paid for."""
        if self._delivery.head is not None or not self._course.again(leg, failure, reason):
            return False
        self._leave()
        self.dispatch()
        return True

    def _leave(self) -> None:
        """Give the worker back."""
        leg, self._leg = self._leg, None
        if leg is not None:
            if self._race is not None:
                self._race.without(leg)
            leg.end()

    def _without(self, leg: Dispatch) -> bool:
        """Give this attempt up, where another one goes on; False: there is none."""
        other = None if self._race is None else self._race.goes_on(leg)
        if other is not None:
            self._leg = other
        return other is not None

    def _legs(self) -> list[Dispatch]:
        """The attempts that are under way."""
        legs = [self._leg, None if self._race is None else self._race.other(self._leg)]
        return [leg for leg in legs if leg is not None]

    # --- ends ---

    def refuse(self, error: ApiError) -> None:
        """End with an error, when it is this one's turn."""
        if self._intake is not None and self._phase is RECEIVING:
            self._intake.release()
        if self._turn:
            self.fail(error)
        else:
            self._error, self.deadline = error, math.inf

    def fail(self, error: ApiError) -> None:
        """End with an error: a whole answer if there is none yet, else break off."""
        if error.status >= 500:
            if self._leg is not None and self._leg.forced:
                error.message += " Every worker of the model has been failing; this one was the least bad."
            log.warning("a request failed", extra={"code": error.code, "reason": error.message, **self._said.ids})
        if not self._delivery.status:
            self.keep_alive = self.keep_alive and self._whole
            self._delivery.error(error, self.keep_alive)
            self.end()
            return
        self._relay.metrics.cut.labels(error.code).inc()
        self._break_off(error)

    def _break_off(self, error: ApiError | None = None) -> None:
        """End an answer that is not whole."""
        self.keep_alive = False
        self._delivery.break_off(error, None if self._leg is None else self._leg.framing)
        self.end()

    def end(self, gone: bool = False) -> None:
        """The one way out."""
        if self._phase is DONE:
            return
        self._phase = DONE
        delivery, model, leg = self._delivery, self._course.model, self._leg
        whole = leg is not None and leg.whole
        if self._entry is not None:
            self._entry.leave(delivery.head, whole, gone)
            model = self._entry.model if model is UNKNOWN and self._entry.model else model
            self._queued = None  # which refers to this
        if self._race is not None:
            self._race.over()
            self._race = None
        if leg is not None:
            self._leg = None
            leg.end()
        self._course.over()
        if self._intake is not None:
            self._intake.release()
        relay = self._relay
        relay.active.discard(self)
        relay.account(
            self._said.route.path, model, delivery.status or (CLIENT_GONE if gone else 500), leg, self._began,
            gone=gone, whole=whole,
        )  # fmt: skip
        if self._course.spans is not None:
            self._course.spans.end(delivery, None if leg is None else leg.span, whole, gone, model, self._began)
        if not gone:
            self._client.answered(self)
