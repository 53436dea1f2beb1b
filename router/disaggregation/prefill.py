"""The request for prefill: one attempt at one worker, of which only what it says of the blocks is kept.

    CONNECTING -> WAITING -> OVER

As a ``Dispatch`` it has no task and no ``await``; connection and relay drive it by calls, and what it holds (the count
of the worker's load, its part of the guard's books, the connection) it gives back once, with ``end``. It tells
``then`` once what came of it, unless it was ended before. It fails for good: its request goes on without it.

Where both workers have the request at once (``Shape.CONCURRENT``) it is the same attempt, beside the other one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from helios.decoding import json_decoder
from router.disaggregation.connectors import Connector
from router.errors import ApiError
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
RANK: Final = b"x-data-parallel-rank"
"""Which rank computes (vLLM 0.32.0, entrypoints/generate/base/serving.py)."""
_DROPPED: Final = frozenset({b"accept-encoding", b"accept"})
"""The answer is for us."""
WRONG: Final = frozenset({400, 413, 422})
"""Statuses by which a worker says that the request itself is wrong, so that no other one would take it."""


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


class Choice(msgspec.Struct):
    finish_reason: str | None = None


class Answer(msgspec.Struct):
    """What is read of one."""

    kv_transfer_params: Raw = NOT_SENT
    usage: Usage | None = None
    choices: Raw = NOT_SENT
    stop_reason: Raw = NOT_SENT
    status: Raw = NOT_SENT

    @property
    def cut(self) -> bool:
        """Whether its limit has ended it, by any API's words. Raises msgspec.DecodeError."""
        if self.choices is not NOT_SENT:
            return any(choice.finish_reason == "length" for choice in _CHOICES.decode(self.choices))
        return bytes(self.stop_reason) == b'"max_tokens"' or bytes(self.status) == b'"incomplete"'


class Refusal(msgspec.Struct):
    """An error, as OpenAI's API has it, and as SGLang and vLLM had it."""

    error: dict[str, Any] = {}
    message: str = ""


_CHOICES: Final = json_decoder(list[Choice])
_ANSWER: Final = json_decoder(Answer)
_REFUSAL: Final = json_decoder(Refusal)

Then = Callable[[bytes, int | None, str, ApiError | None], None]
"""Hears where the blocks are (JSON; empty: the worker does not say), how many tokens of the prompt were cached, why it
failed, as a label; and what the worker said where the request is wrong."""


class Prefill:
    """One request for prefill. ``deadline``, in the loop's seconds: when ``expire`` is due."""

    __slots__ = (
        "_attempt", "_body", "_connecting", "_connection", "_connector", "_head", "_identity", "_lease", "_over",
        "_payload", "_pieces", "_rank", "_relay", "_renewed", "_said", "_size", "_span", "_then", "_trace", "deadline",
        "worker",
    )  # fmt: skip

    def __init__(
        self, relay: Relay, said: RequestHead, worker: Worker, trace: Trace, lease: Lease, timeout_s: float,
        span: Sending | None, then: Then, connector: Connector,
    ) -> None:  # fmt: skip
        """The step that follows the choice of ``worker``, whose count is in ``lease``; ``trace``: its place there."""
        self._connector = connector
        self._relay, self._said, self.worker, self._trace, self._then = relay, said, worker, trace, then
        self._lease, self._span = lease, span
        now = relay.now()
        self._attempt = Attempt(worker.guard, now, said.route.engine)
        self._body = self._identity = self._rank = b""
        self._connecting: Connecting | None = None
        self._connection: Connection | None = None
        self._renewed = self._over = False
        self._head: Head | None = None
        self._payload: Payload | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self.deadline = now + timeout_s

    def begin(self, body: bytes, identity: bytes, rank: bytes) -> None:
        """Send it. ``identity``: what the request is called, ``rank``: which one it is for; empty: as ever."""
        self._body, self._identity, self._rank = body, identity, rank
        connection = self._relay.pool.idle(self.worker)
        if connection is None:
            self._connecting = self._relay.pool.connect(self.worker, self)
        else:
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        self._connection = connection
        relay, worker = self._relay, self.worker
        raw = relay.keys.in_place(self._said.headers, worker, ours=relay.authenticates)
        raw = [pair for pair in raw if pair[0] not in _DROPPED and not (self._rank and pair[0] == RANK)]
        if self._rank:
            raw.append((RANK, self._rank))
        head = self._said.to_worker(worker, raw, len(self._body), self._trace, self._identity)
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
        body = body if self._payload is None else self._payload.of(body)
        if status != HTTPStatus.OK:
            wrong = _refusal(status, body) if status in WRONG else None
            self._fail("refused", Outcome.FAILED if status in FAILING else Outcome.OK, wrong)
            return
        row, params = self._connector, b""
        try:
            answer = _ANSWER.decode(body)
            params = bytes(answer.kv_transfer_params) if row.answers else b""
            found = (params.startswith(b"{") or not row.answers) and (not row.cut or answer.cut)
        except (msgspec.DecodeError, UnicodeDecodeError):
            found = False
        if not found:
            self._fail("no_blocks", Outcome.OK)
            return
        self._attempt.outcome = Outcome.OK
        cached = None if answer.usage is None else answer.usage.cached
        self._close(whole=True)
        self._then(params, cached, "", None)

    # --- ends ---

    def expire(self) -> None:
        """The deadline has passed."""
        if not self._over:
            self._fail("late", Outcome.TIMED_OUT)

    def _fail(self, why: str, outcome: Outcome, refusal: ApiError | None = None) -> None:
        self._attempt.outcome = outcome
        if self._span is not None:
            self._span.error = why
        log.info("a prompt is not computed elsewhere", extra={
            "worker": self.worker.url, "reason": why, **self._said.ids,
        })  # fmt: skip
        self._close(whole=False)
        self._then(b"", None, why, refusal)

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


def _refusal(status: int, body: bytes) -> ApiError:
    """What the worker said, for the client."""
    try:
        said = _REFUSAL.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = Refusal()
    message = said.error.get("message") or said.message
    return ApiError(status, "refused_by_worker", message if isinstance(message, str) and message else "It is refused.")
