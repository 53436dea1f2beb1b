"""One request of a gateway, from its head to the end of what is known of it.

    RECEIVING -> QUEUED -> PICKED -> DONE

RECEIVING: the body comes. QUEUED: limits, the registry or the index are asked, or it waits for a worker. PICKED: a
worker was chosen, where it counts from that step on. As with the relay's ``Exchange`` there is no task and no
``await``: the stream drives it by calls, and the relay's timer when its deadline has passed; ``end`` is the one way out
and gives everything back. It decides nothing that an exchange does not: who may ask is ``Admission``'s to say, where it
goes ``Course``'s.
"""

from __future__ import annotations

import logging
import math
from enum import Enum
from typing import TYPE_CHECKING, Final

from router import errors
from router.errors import ApiError
from router.picker.subset import Subset
from router.relay.course import NOBODY, Course
from router.relay.headers import Headers
from router.relay.intake import Intake
from router.relay.queued import Queued
from router.relay.request_head import RequestHead
from router.resilience.guard import Attempt
from router.resilience.outcome import Outcome
from router.resilience.resilience import FAILING
from router.routes import InferenceRoute
from router.scheduling.max_score import busy
from router.worker import Lease, Worker

if TYPE_CHECKING:
    from router.admission.entry import Entry
    from router.picker.picker import Picker

log = logging.getLogger("helios.router")


class Phase(Enum):
    RECEIVING = 0
    QUEUED = 1
    PICKED = 2
    DONE = 3


RECEIVING, QUEUED, PICKED, DONE = Phase
GOOD: Final = 200


class Pick:
    """One request. ``deadline`` is when ``expire`` is due, in the loop's seconds.

    ``over``: called when it is answered after ``complete`` had returned (``worker`` or ``error`` says how), and when
    it is to be left after it was answered."""

    __slots__ = (
        "_attempt",
        "_began",
        "_course",
        "_entry",
        "_intake",
        "_lease",
        "_phase",
        "_picked_at",
        "_picker",
        "_queued",
        "_route",
        "_seen",
        "_sent",
        "_subset",
        "body",
        "changed",
        "deadline",
        "endpoints",
        "error",
        "keep_alive",
        "over",
        "worker",
    )  # fmt: skip

    def __init__(
        self, picker: Picker, route: InferenceRoute, query: bytes, raw: Headers, subset: Subset | None
    ) -> None:
        """``raw``: headers with lower-case names; ``subset``: the only endpoints that may be chosen; None: all."""
        relay = picker.relay
        self._picker, self._route, self._subset = picker, route, subset
        self._course = Course(relay, RequestHead(route, query, raw, relay.bits), ours=False)
        self._phase = RECEIVING
        self._entry: Entry | None = None
        self._queued: Queued | None = None
        self._intake: Intake | None = None
        self._lease: Lease | None = None
        self._attempt: Attempt | None = None
        self._sent, self._seen = b"", 0
        self.worker: Worker | None = None
        self.endpoints = ""
        """Where it goes, ``ip:port``, then where it may go otherwise, with commas."""
        self.error: ApiError | None = None
        self.body = b""
        """As the worker is to get it..."""
        self.changed = False
        """...and whether that is not as it came."""
        self.keep_alive = True
        self.over = _nothing
        self._began = relay.now()
        self._picked_at = 0.0
        self.deadline = self._began + relay.settings.idle_timeout_s
        relay.active.add(self)
        try:
            if not query.isascii():
                raise errors.invalid_body("The URL's query holds bytes that are not ASCII.", "invalid_url")
            if relay.admission is not None:
                self._entry = relay.admission.enter(route, raw)
                self._queued = Queued(self, self._entry, self)
            self._intake = Intake(route, raw, relay.max_body, relay.budget)
        except ApiError as error:
            self.fail(error)

    def answered(self) -> bool:
        """Whether it is known what becomes of it."""
        return self._phase is PICKED or self._phase is DONE

    def picked(self) -> bool:
        """Whether it is on its way to a worker, or there, as far as is known."""
        return self._phase is PICKED

    @property
    def identity(self) -> bytes:
        return self._course.said.identity

    def description(self, error: ApiError) -> bytes:
        """The body of an answer with an error, as clients of the route read it."""
        return self._route.dialect.body(error, self.identity.decode())

    # --- the gateway's side ---

    def feed(self, piece: bytes) -> None:
        """The next bytes of the body."""
        if self._phase is not RECEIVING or self._intake is None:
            return
        self.deadline = self._picker.relay.now() + self._picker.relay.settings.idle_timeout_s
        try:
            self._intake.feed(piece)
        except ApiError as error:
            self.fail(error)

    def complete(self) -> None:
        """The body is whole. When this returns it may be ``answered``, or ``over`` is called later."""
        if self._phase is not RECEIVING or self._intake is None:
            return
        self._phase, self.deadline = QUEUED, math.inf  # whoever is asked has a deadline of his own
        try:
            self._intake.finish()
        except ApiError as error:
            self.fail(error)
            return
        self._sent = self._intake.content
        if self._queued is None:
            self.admitted()
        else:
            self._queued.admit(self._intake)

    def told(self) -> None:
        """The gateway has its answer: the body is not needed any more, by whoever still has this."""
        self.body = self._sent = b""
        if self._intake is not None:
            self._intake.release()

    # --- what admission and the queue say (``queued.Owner``, ``queued.Told``) ---

    def admitted(self) -> None:
        assert self._intake is not None
        if not self._course.look_up(self._intake, self._looked_up):
            self._choose()

    def called(self) -> None:
        self._course.wait_on()
        self._choose()

    def comment(self, text: bytes, keep_alive: bool) -> None:
        """A gateway can't be told that its client waits."""

    def fail(self, error: ApiError) -> None:
        """It is answered with an error, or left where it has an answer already."""
        if self._phase is DONE:
            return
        if self._phase is not PICKED:
            self.error = error
            self._picker.count(error.code)
            if error.status >= 500:
                extra = {"code": error.code, "reason": error.message, **self._course.said.ids}
                log.warning("a gateway's request failed", extra=extra)
        self.end()
        self.over()

    # --- what the relay says ---

    def expire(self) -> None:
        """The deadline has passed."""
        if self._phase is RECEIVING:
            self.fail(errors.body_timeout(self._picker.relay.settings.idle_timeout_s))
        elif self._queued is not None:
            self._queued.look()

    def cut(self) -> None:
        """The router's time is up."""
        self.fail(errors.shutting_down())

    # --- choosing ---

    def _looked_up(self) -> None:
        if self._phase is QUEUED:
            self._choose()

    def _choose(self) -> None:
        picker, course, intake = self._picker, self._course, self._intake
        assert intake is not None
        try:
            outside = self._outside(intake)
            to = course.choose(intake, self._entry, outside)
        except ApiError as error:
            self.fail(error)
            return
        if to is None:
            assert self._queued is not None
            self._queued.wait()
            return
        request, workers = course.request, picker.relay.workers
        worker = workers.at(to.url)
        assert request is not None
        assert worker is not None
        now = self._picked_at = picker.relay.now()
        # Nobody here sees when the first byte comes, nor whether the engine owes an answer.
        self._lease = workers.lease(worker, request.tokens, request.adapter, request.prefill, streamed=False)
        self._attempt = Attempt(worker.guard, now, engine=False)
        self.worker, self._phase, self.deadline = worker, PICKED, math.inf
        self.endpoints = picker.endpoint(worker)
        if picker.settings.endpoints > 1:
            others = sorted(workers.candidates(course.model, outside | {worker}), key=busy)
            self.endpoints = ",".join(
                [self.endpoints, *map(picker.endpoint, others[: picker.settings.endpoints - 1])]
            )  # fmt: skip
        self.body, self.changed = intake.content, intake.content is not self._sent
        course.over()
        picker.picked(now - self._began)
        self.over()

    def _outside(self, intake: Intake) -> frozenset[Worker]:
        """The workers that it can't go to. Raises ApiError where the subset leaves none."""
        outside, subset, model = self._picker.unreachable, self._subset, intake.model
        if model is None or (subset is None and not outside):
            return outside
        workers, endpoint = self._picker.relay.workers, self._picker.endpoint
        if subset is not None:
            outside = frozenset(w for w in workers.all if w in outside or not subset.has(endpoint(w)))
            why = f"none of the {len(subset)} endpoints that the gateway allows serves it now"
        else:
            why = "gateways can't be sent to those that serve it"
        # Whoever waits is called when any worker has room, so what none of these can take must not wait.
        inside, able = workers.candidates(model, outside), workers.candidates(model, NOBODY)
        if workers.known(model) and not inside and (able or subset is not None):
            raise errors.no_worker(model, why, math.ceil(self._picker.relay.settings.health_interval_s))
        return outside

    # --- what is seen of the answer, where the gateway is followed ---

    def headers(self, status: int, served: str) -> None:
        """The head of the answer came, from the endpoint ``served``; "": that is not said."""
        self._seen = status
        if served and self._attempt is not None and served != self._picker.endpoint(self.worker):
            self._elsewhere(served)
        if self._attempt is not None:
            self._attempt.outcome = Outcome.FAILED if status in FAILING else Outcome.OK

    def piece(self) -> None:
        """Bytes of the answer's body came."""
        lease, worker = self._lease, self.worker
        if lease is None or worker is None or not self._picked_at:
            return
        now = self._picker.relay.now()
        lease.computed()
        if self._seen == GOOD:
            worker.first_byte[1].observe(now - self._picked_at, now)
        self._picked_at = 0.0

    def _elsewhere(self, served: str) -> None:
        """The gateway tried another one than the first: it counts there."""
        picker, workers = self._picker, self._picker.relay.workers
        picker.metrics.picks_elsewhere.inc()
        other = next((w for w in workers.all if picker.endpoint(w) == served), None)
        if self._attempt is not None:
            self._attempt.outcome = Outcome.FAILED
        self._release()
        if other is not None:
            self.worker = other
            self._lease = workers.lease(other, streamed=False)
            self._attempt = Attempt(other.guard, picker.relay.now(), engine=False)

    # --- the end ---

    def leave(self) -> None:
        """The gateway is left: the request counts until it is over by the ledger."""
        worker, lease = self.worker, self._lease
        if self._phase is PICKED and worker is not None and lease is not None:
            self._lease = None
            self._picker.ledger.add(worker, self._picked_at, lease)
            self._release()
            self._close(gone=False)

    def end(self) -> None:
        """It is over: answered with an error, or the gateway's stream has ended. It may be called again."""
        if self._phase is DONE:
            return
        if not self.answered() and self.error is None:
            self._picker.count("gone")
        self._release()
        self._close(gone=self.error is None)

    def _close(self, gone: bool) -> None:
        picked, self._phase = self._phase is PICKED, DONE
        if self._entry is not None:
            if picked and self._seen < 400:
                self._entry.leave_unseen()
            else:
                self._entry.leave(None, False, gone)
            self._queued = None  # which refers to this
        self._course.over()
        if self._intake is not None:
            self._intake.release()
        self._picker.relay.active.discard(self)

    def _release(self) -> None:
        """Give the worker back."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.end()
        lease, self._lease = self._lease, None
        if lease is not None and self.worker is not None:
            lease.end()
            self._picker.freed(self.worker)


def _nothing() -> None:
    pass
