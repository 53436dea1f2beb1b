"""The request for prefill: one attempt at one worker, of which only what it says of the blocks is kept.

    CONNECTING -> WAITING -> OVER

As a ``Dispatch`` it has no task and no ``await``; connection and relay drive it by calls, and what it holds (the count
of the worker's load, its part of the guard's books, the connection) it gives back once, with ``end``. It tells
``then`` once what came of it, unless it was ended before. It fails for good: its request goes on without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Raw

from helios.decoding import json_decoder
from router.relay.ending import chunked
from router.relay.framing import Head, Payload
from router.relay.said import NOT_SENT
from router.relay.upstream import Connecting, Connection, Taker
from router.resilience.guard import Attempt
from router.resilience.outcome import Outcome
from router.resilience.resilience import FAILING
from router.worker import Lease, Worker

if TYPE_CHECKING:
    from router.relay.relay import Relay
    from router.relay.request_head import RequestHead
    from router.relay.trace import Trace
    from router.tracing.recorder import Sending

log = logging.getLogger("helios.router")

MOST: Final = 4 << 20
"""Longest answer, in bytes: a number for each block of the prompt, and one token."""
_DROPPED: Final = frozenset({b"accept-encoding", b"accept"})
"""The answer is for us."""


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """That of any API."""

    prompt_tokens_details: Details | None = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: int | None = None

    @property
    def cached(self) -> int | None:
        details = self.prompt_tokens_details or self.input_tokens_details
        return self.cache_read_input_tokens if details is None else details.cached_tokens


class Answer(msgspec.Struct):
    """What is read of one."""

    kv_transfer_params: Raw = NOT_SENT
    usage: Usage | None = None


_ANSWER: Final = json_decoder(Answer)

Then = Callable[[bytes, int | None, str], None]
"""Hears where the blocks are (JSON; empty: there are none), how many tokens of the prompt were cached, and why it
failed, as a label."""


class Prefill:
    """One request for prefill. ``deadline``, in the loop's seconds: when ``expire`` is due."""

    __slots__ = (
        "_attempt", "_body", "_connecting", "_connection", "_head", "_lease", "_over", "_payload", "_pieces", "_relay",
        "_renewed", "_said", "_size", "_span", "_then", "_trace", "deadline", "worker",
    )  # fmt: skip

    def __init__(
        self, relay: Relay, said: RequestHead, worker: Worker, trace: Trace, lease: Lease, timeout_s: float,
        span: Sending | None, then: Then,
    ) -> None:  # fmt: skip
        """The step that follows the choice of ``worker``, whose count is in ``lease``; ``trace``: its place there."""
        self._relay, self._said, self.worker, self._trace, self._then = relay, said, worker, trace, then
        self._lease, self._span = lease, span
        now = relay.now()
        self._attempt = Attempt(worker.guard, now, said.route.engine)
        self._body = b""
        self._connecting: Connecting | None = None
        self._connection: Connection | None = None
        self._renewed = self._over = False
        self._head: Head | None = None
        self._payload: Payload | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self.deadline = now + timeout_s

    def begin(self, body: bytes) -> None:
        """Send it."""
        self._body = body
        connection = self._relay.pool.idle(self.worker)
        if connection is None:
            self._connecting = self._relay.pool.connect(self.worker, self)
        else:
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        self._connection = connection
        relay, worker = self._relay, self.worker
        raw = relay.keys.in_place(self._said.headers, worker, ours=relay.authenticates)
        raw = [pair for pair in raw if pair[0] not in _DROPPED]
        head = self._said.to_worker(worker, raw, len(self._body), self._trace)
        taker: Taker = self if self._span is None else self._span.watching(self)
        connection.ask(taker, head, self._body, None, True)

    # --- what the connection says ---

    def connected(self, connection: Connection) -> None:
        self._connecting = None
        self._send(connection)

    def not_connected(self, reason: str) -> None:
        self._connecting = None
        if self.worker.health.failed(reason):
            log.warning("a worker is down", extra={"worker": self.worker.url, "reason": reason})
        self._fail("not_sent", Outcome.FAILED)

    def out_of_descriptors(self) -> None:
        self._connecting = None
        self._fail("not_sent", Outcome.SAYS_NOTHING)

    def came(self, head: Head | None, piece: bytes, ended: bool) -> None:
        if head is not None:
            self._head = head
            self._payload = Payload() if chunked(head) else None
        now = self._relay.now()
        assert self._head is not None
        if piece:
            self._attempt.heard(now, self._head.status)
            self._size += len(piece)
            if self._size > MOST:
                self._fail("too_long", Outcome.SAYS_NOTHING)
                return
            self._pieces.append(piece)
        if ended:
            self._answered(self._head.status)

    def malformed(self, reason: str) -> None:
        self._connection = None
        self._fail("broke", Outcome.FAILED)

    def broke(self, reason: str, stale: bool) -> None:
        self._connection = None
        if not stale or self._renewed:
            self._fail("broke", Outcome.FAILED)
            return
        self._renewed = True
        if self._span is not None:
            self._span.reconnects(self._relay.now())
        self._connecting = self._relay.pool.connect(self.worker, self)

    def _answered(self, status: int) -> None:
        """All of it is here."""
        body = b"".join(self._pieces)
        if status != HTTPStatus.OK:
            self._fail("refused", Outcome.FAILED if status in FAILING else Outcome.OK)
            return
        try:
            answer = _ANSWER.decode(body if self._payload is None else self._payload.of(body))
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._fail("no_blocks", Outcome.OK)
            return
        params = bytes(answer.kv_transfer_params)
        if not params.startswith(b"{"):
            self._fail("no_blocks", Outcome.OK)
            return
        self._attempt.outcome = Outcome.OK
        cached = None if answer.usage is None else answer.usage.cached
        self._close(whole=True)
        self._then(params, cached, "")

    # --- ends ---

    def expire(self) -> None:
        """The deadline has passed."""
        if not self._over:
            self._fail("late", Outcome.TIMED_OUT)

    def _fail(self, why: str, outcome: Outcome) -> None:
        self._attempt.outcome = outcome
        if self._span is not None:
            self._span.error = why
        log.info("a prompt is not computed elsewhere", extra={
            "worker": self.worker.url, "reason": why, **self._said.ids,
        })  # fmt: skip
        self._close(whole=False)
        self._then(b"", None, why)

    def end(self) -> None:
        """Nobody waits for it any more."""
        if not self._over:
            self._attempt.outcome = Outcome.OWED
            self._close(whole=False)

    def _close(self, *, whole: bool) -> None:
        """Give everything back."""
        self._over = True
        if self._span is not None:
            self._span.left(self._relay.now(), 0.0, whole)
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.free()
        self._attempt.end()
        self._lease.end()
        self._pieces, self._body = [], b""
