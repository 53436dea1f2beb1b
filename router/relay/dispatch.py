"""One attempt at one worker, or at a fallback's endpoint, from the choice to the end of its answer.

    PREFILLING -> CONNECTING -> WAITING -> RELAYING -> OVER

PREFILLING: another worker computes its prompt (``router.disaggregation``); where both workers have the request at once
it goes on beside the next two, and the answer is held until it has succeeded. CONNECTING: a connection is being made.
WAITING: the request was sent, no byte of the answer's body is here. RELAYING: it is. There is no task and no ``await``
in here: the connection drives it by calls, and ``Relay`` when its deadline has passed. What it holds (the count of the
worker's load, its part of the guard's books, the connection) it holds from its making to ``end``, which gives all of it
back once, whatever happened; every way out leads there.

It decides nothing about the request: its owner is asked whether an answer's head counts (``begins``), and told of each
failure. What the owner has taken goes on to the client from here, since that is done most often of all.
"""

from __future__ import annotations

import logging
import re
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from router import errors
from router.disaggregation.holding import Held, Probed
from router.disaggregation.transfer import NO_TICKET
from router.errors import ApiError
from router.relay.ending import TAIL
from router.relay.framing import Framing, Head
from router.relay.race import Begun
from router.relay.renaming import renamed
from router.relay.upstream import Connecting, Connection, Taker
from router.resilience.guard import Attempt
from router.resilience.outcome import Outcome
from router.resilience.resilience import FAILING
from router.resilience.retry import Failure
from router.workers import Lease, Worker

if TYPE_CHECKING:
    from router.disaggregation.prefill import Prefill
    from router.disaggregation.transfer import Transfer
    from router.relay.course import Course
    from router.relay.delivery import Delivery
    from router.relay.exchange import Exchange
    from router.relay.intake import Intake
    from router.relay.race import Race
    from router.relay.relay import Relay
    from router.relay.trace import Trace
    from router.resilience.fallback import Endpoint
    from router.tracing.recorder import Sending

log = logging.getLogger("helios.router")

GRACE_S: Final = 1.0
"""So long an error waits for the worker that computes the prompt, whose own error counts before it."""
COMMENT: Final = 32
"""Longest piece that may be nothing but a comment between events..."""
IS_COMMENT: Final = re.compile(rb"(?:[0-9a-fA-F]+\r\n)?:[^\n]*\n\n(?:\r\n)?\Z")
"""...which vLLM's API server sends by itself (``--sse-keep-alive-interval``), also while its engine hangs."""


class Phase(Enum):
    CONNECTING = 0
    WAITING = 1
    RELAYING = 2
    OVER = 3
    PREFILLING = 4


# Attributes of an Enum take as long to get as a method to call.
CONNECTING, WAITING, RELAYING, OVER, PREFILLING = Phase
WELL: Final = Outcome.OK
FAILED: Final = Outcome.FAILED
GOOD: Final = int(HTTPStatus.OK)


class Dispatch:
    """One attempt. ``deadline`` is when ``expire`` is due, in the loop's seconds."""

    __slots__ = (
        "_attempt", "_connecting", "_connection", "_course", "_delivery", "_held", "_idle_s", "_intake", "_lease",
        "_owner", "_prefill", "_relay", "_renewed", "_ticket", "deadline", "first_byte_at", "framing",
        "phase", "race", "sent_at", "span", "streamed", "to", "trace", "worker",
    )  # fmt: skip

    def __init__(
        self, owner: Exchange, relay: Relay, course: Course, intake: Intake, delivery: Delivery,
        to: Worker | Endpoint, trace: Trace,
    ) -> None:  # fmt: skip
        """The step that follows ``course``'s choice of ``to``, where the request counts from now on.

        ``intake`` has its body; ``delivery``: where the answer goes; ``trace``: its place in the trace."""
        now, request = relay.now(), course.request
        self._owner, self._relay, self._course, self._intake, self._delivery = owner, relay, course, intake, delivery
        self.to, self.trace = to, trace
        self.span: Sending | None = None if course.spans is None else course.spans.sends(to, trace.span, now)
        """What is noted for its span; None where it has none."""
        self.worker: Worker | None = None
        """None: it goes to an endpoint."""
        self._lease: Lease | None = None
        self.streamed = False
        """Whether a stream was asked for."""
        if request is not None and isinstance(to, Worker):
            self.worker, self.streamed = to, request.stream
            self._lease = relay.workers.lease(
                to, request.tokens, request.adapter, request.prefill, streamed=request.stream
            )
        self._attempt = Attempt(to.guard, now, course.said.route.engine)
        self._connection: Connection | None = None
        self._connecting: Connecting | None = None
        self.framing: Framing | None = None
        """The connection's; it stays when that is gone."""
        self._renewed = False
        """Whether a kept connection was stale, and a new one took its place."""
        self._prefill: Prefill | None = None
        self._ticket = NO_TICKET
        """By which it takes what another worker has computed for it..."""
        self._held: Held | Probed | None = None
        """...and what holds its answer, while that does not count yet."""
        self.phase = CONNECTING
        self.race: Race | None = None
        """Where it may have another one beside it."""
        self._idle_s = relay.settings.idle_timeout_s
        self.sent_at, self.first_byte_at = now, 0.0
        self.deadline = now + relay.settings.first_byte_timeout_s
        relay.dispatches.add(self)

    @property
    def forced(self) -> bool:
        """Whether the worker most likely can't serve, but there was no better one."""
        return self._attempt.forced

    @property
    def silent(self) -> bool:
        """Whether nothing of an answer has come, though its client could take it."""
        begun = self.phase is RELAYING or self.phase is OVER
        return not (begun or self._delivery.paused or self._delivery.head is not None)

    @property
    def whole(self) -> bool:
        """Whether all of an answer has come, and counts."""
        return self.framing is not None and self.framing.ended and (self._held is None or self._held.open)

    def beside(self, worker: Worker) -> Dispatch:
        """Another attempt at the same request."""
        return Dispatch(
            self._owner, self._relay, self._course, self._intake, self._delivery, worker,
            self.trace.beside(self._relay.bits),
        )  # fmt: skip

    def begin(self) -> None:
        """Send the request, when its prompt has been computed elsewhere if that is worth it, or while it is."""
        splits, worker = self._relay.splits, self.worker
        if splits is not None and worker is not None and worker.role == "decode":
            self.phase = PREFILLING
            try:
                self._prefill, self._ticket = splits.begin(self._course, self._intake, worker, self._prefilled)
            except ApiError as error:
                self._owner.failed(self, None, "", error)
                return
            transfer = self._course.transfer
            if self._prefill is not None:
                self.deadline = self._prefill.deadline
                if self._lease is not None:
                    self._lease.computed()
                if transfer is None or not transfer.paired:
                    return
            self.phase = CONNECTING
        self._go()

    def _prefilled(self) -> None:
        """What came of it is in ``course.transfer``."""
        self._prefill = None
        now = self.sent_at = self._relay.now()
        self.deadline = now + self._relay.settings.first_byte_timeout_s
        self._attempt.begins(now)
        if self.phase is PREFILLING:
            self.phase = CONNECTING
            self._go()
        elif self.phase is WAITING:
            self._judge()

    def _judge(self) -> None:
        """Both workers had the request, and the one that computes the prompt is through."""
        transfer, held, connection = self._course.transfer, self._held, self._connection
        assert transfer is not None
        assert isinstance(held, Held)
        if transfer.taken:
            held.release(transfer.passing)
            self._held = None
            if self._connection is not None and not self._delivery.paused:
                self._connection.resume()
            return
        self._unhold()
        self._connection, self.framing, self.phase = None, None, CONNECTING
        if connection is not None:
            connection.abort()  # the worker waits for what never comes
        if transfer.undone:
            self.begin()
        else:
            self._go()

    def _missed(self) -> None:
        """The worker has too little of the prompt."""
        self._held = None
        connection, self._connection = self._connection, None
        self.framing, self.phase = None, CONNECTING
        self.deadline = self._relay.now() + self._relay.settings.first_byte_timeout_s
        if connection is not None:
            connection.free()
        if self._course.transfer is not None:
            self._course.transfer.missed()
        self.begin()

    def _had(self) -> None:
        """The worker has enough of the prompt, and answers."""
        if self._course.transfer is not None:
            self._course.transfer.had()
        if self._relay.splits is not None:
            self._relay.splits.had(self._course)

    def _unhold(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.drop()

    def _go(self) -> None:
        """Send it over a kept connection or a new one."""
        pool = self._relay.pool
        connection = None if self._renewed else pool.idle(self.to)
        if connection is None:
            self._connecting = pool.connect(self.to, self)
        else:
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        self._connection, self.framing, self.phase = connection, connection.framing, WAITING
        course, intake, delivery = self._course, self._intake, self._delivery
        said, worker = course.said, self.worker
        taker: Taker = self if self.race is None else Begun(self)
        if self.span is not None:
            taker = self.span.watching(taker)
        if worker is None:
            assert course.endpoint is not None
            head = course.endpoint.head(said, len(course.body))
            connection.ask(taker, head, course.body, None, delivery.http11)
        else:
            relay = self._relay
            raw = relay.keys.in_place(said.headers, worker, ours=relay.authenticates)
            content, transfer, identity = intake.content, course.transfer, b""
            blocks = b"" if transfer is None else transfer.take(self._ticket, worker.revision)
            renames = relay.renames and said.route.named and not course.diverted
            if delivery.held or renames or blocks:  # compressed, it would not fit its head, or hide the name
                raw = [pair for pair in raw if pair[0] != b"accept-encoding"]
            if renames:
                taker = renamed(taker, intake.asked)
            if blocks and transfer is not None:
                content, taker, identity = blocks, self._holding(transfer, taker, connection), transfer.identity
            head = said.to_worker(worker, raw, len(blocks) or intake.size, self.trace, identity)
            connection.ask(taker, head, content, intake.spool, delivery.http11)
        if delivery.paused:
            connection.pause()

    def _holding(self, transfer: Transfer, taker: Taker, connection: Connection) -> Taker:
        """Takes the answer to what another worker has computed, computes, or is to compute if need be."""
        if transfer.paired:
            self._held = held = Held(taker, self._holds)
            return held
        if transfer.probing:
            self._held = probed = Probed(taker, self._missed, self._had)
            return probed
        return transfer.passing(taker)

    def _holds(self, head: Head | None) -> None:
        """Something of an answer is held. An error may come of the other worker's, which comes soon then."""
        if self._connection is not None:
            self._connection.pause()
        if head is not None and head.status >= HTTPStatus.BAD_REQUEST:
            self.deadline = min(self.deadline, self._relay.now() + GRACE_S)

    # --- what the connection says ---

    def connected(self, connection: Connection) -> None:
        self._connecting = None
        transfer = self._course.transfer
        if transfer is not None and self._ticket and transfer.undone:  # its prompt is computed once more
            connection.abort()
            self.begin()
        else:
            self._send(connection)

    def not_connected(self, reason: str) -> None:
        self._connecting = None
        self._attempt.outcome = FAILED
        self._owner.unreachable(self, reason)

    def out_of_descriptors(self) -> None:
        self._connecting = None
        self._attempt.outcome = Outcome.SAYS_NOTHING
        self._owner.failed(self, None, "", errors.out_of_descriptors())

    def came(self, head: Head | None, piece: bytes, ended: bool) -> None:
        now, attempt, delivery = self._relay.now(), self._attempt, self._delivery
        if head is not None:
            if head.status in FAILING:
                attempt.outcome = FAILED
            if not self._owner.begins(self, head, piece):
                return
        elif piece:
            delivery.client.transport.write(piece)
        if piece:
            if not self.first_byte_at:
                self._first_byte(now)
            if delivery.entry is not None:
                delivery.entry.came(piece)
            delivery.tail = piece[-TAIL:] if len(piece) >= TAIL else (delivery.tail + piece)[-TAIL:]
            self.deadline = now + self._idle_s
            if len(piece) > COMMENT or not IS_COMMENT.match(piece):
                attempt.heard(now, delivery.status)
        if ended:
            if attempt.outcome is not FAILED:
                attempt.outcome = WELL
            self._owner.end()

    def _first_byte(self, now: float) -> None:
        """The answer's first byte is here. Errors come fast, and say nothing of how long answers take."""
        self.first_byte_at, self.phase = now, RELAYING
        if self._lease is not None:
            self._lease.computed()
        if self.worker is not None and self._delivery.status == GOOD:
            self.worker.first_byte[self.streamed].observe(now - self.sent_at, now)

    def malformed(self, reason: str) -> None:
        self._connection = None
        self._attempt.outcome = FAILED
        self._owner.failed(self, Failure.BROKE, reason, errors.bad_answer(reason))

    def broke(self, reason: str, stale: bool) -> None:
        self._connection = None
        if not stale or self._renewed:
            self._attempt.outcome = FAILED
            self._owner.failed(self, Failure.BROKE, reason, errors.worker_lost(reason))
            return
        # A worker that closed one kept connection has most likely closed them all.
        self._renewed, self.phase = True, CONNECTING
        if self.span is not None:
            self.span.reconnects(self._relay.now())
        self._course.once_more(self, "stale_connection", reason)
        self._unhold()
        if self._course.transfer is not None and self._course.transfer.lost(self._ticket):
            if self._prefill is not None:
                self._prefill.end()
                self._prefill = None
            self.begin()
            return
        self._connecting = self._relay.pool.connect(self.to, self)

    # --- what the relay says ---

    def expire(self) -> None:
        """The deadline has passed."""
        if self.phase is OVER:
            return
        if self._prefill is not None and isinstance(self._held, Held) and self._held.refused:
            self._prefill.end()
            if self._course.transfer is not None:
                self._course.transfer.given_up()
            self._prefilled()
        elif self._prefill is not None:
            self._prefill.expire()
        elif self._delivery.paused:
            self._owner.not_taken()
        elif self.phase is RELAYING:
            self._attempt.outcome = FAILED
            self._owner.failed(self, None, "", errors.idle_timeout(self._idle_s))
        else:
            self._attempt.outcome = Outcome.TIMED_OUT
            timeout_s = self._relay.settings.first_byte_timeout_s
            self._owner.failed(self, None, "", errors.first_byte_timeout(timeout_s))

    def hung(self) -> None:
        """The worker generates nothing: do not wait for it, where the request can be sent again."""
        if self.phase is WAITING:
            self._owner.hung(self)

    # --- what the owner says ---

    def pause(self) -> None:
        """The client takes less than comes."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def failed(self, why: str) -> None:
        """Note what became of it, for its span; ``end`` follows, or has been."""
        if self.span is not None:
            self.span.error = why

    def abandon(self) -> None:
        """Nobody waits for its answer any more, which is nothing that the worker did; ``end`` follows."""
        self._attempt.outcome = Outcome.OWED if self.phase is WAITING else Outcome.SAYS_NOTHING

    def lost(self) -> None:
        """The other one of a race has an answer; ``end`` follows."""
        if self.span is not None:
            self.span.overtaken = True
        self.abandon()

    def overtaken(self) -> None:
        """One that was sent later has an answer: the first byte takes at least so long here; ``end`` follows."""
        if self.phase is WAITING and self.worker is not None:
            now = self._relay.now()
            self._attempt.overtaken(now)
            known, waited_s = self.worker.first_byte[self.streamed], now - self.sent_at
            if waited_s > known.value(now):
                known.observe(waited_s, now)
        self.lost()

    def end(self) -> None:
        """Give everything back; it may be called again."""
        if self.phase is OVER:
            return
        self.phase = OVER
        relay = self._relay
        relay.dispatches.discard(self)
        self._unhold()
        if self._prefill is not None:
            self._prefill.end()
            self._prefill = None
        if self._course.transfer is not None:
            self._course.transfer.left(self._ticket)
        if self.span is not None:
            self.span.left(relay.now(), self.first_byte_at, self.whole)
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.free()
        self._attempt.end()
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.end()
            if relay.admission is not None and self.worker is not None:
                relay.admission.freed(self.worker)
