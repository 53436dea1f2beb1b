"""What is noted of requests for their spans, without I/O: which are recorded, and the queue where they wait.

A trace that a client began is recorded if that says so (the flag in its ``traceparent``), one of the router's own by
its id: in as large a share as ``ratio`` says, and by every process alike. A request has a span of the server's kind,
and for each attempt (``Dispatch``) one of the client's kind, whose id the worker gets as its parent. The two attempts
of a hedged request are two such spans.

All of it is synchronous and runs in the event loop's thread. The queue is bounded; what finds it full is counted and
forgotten.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from router.admission.usage import Meter
from router.admission.usage_said import Usage
from router.relay.framing import Head, Mode
from router.relay.trace import SAMPLED, Trace

if TYPE_CHECKING:
    from router.relay.delivery import Delivery
    from router.relay.request_head import RequestHead
    from router.relay.upstream import Taker, Upstream

GONE: Final = "client_gone"
BROKEN_OFF: Final = "broken_off"
OTHER: Final = "_OTHER"
"""OpenTelemetry's name of an error, or of a method, that has none."""
LONGEST_PATH: Final = 256
"""So much of a path is kept: a client may write any."""


class Sending:
    """One time that the request was sent. Times in the relay's seconds; ``span``: its id in hex."""

    __slots__ = (
        "began", "ended", "error", "first_byte_at", "head", "meter", "overtaken", "reconnected_at", "span", "url",
        "whole", "worker",
    )  # fmt: skip

    def __init__(self, span: bytes, to: Upstream, began: float) -> None:
        self.span, self.url, self.worker, self.began = span, to.url, to.ours, began
        self.ended = self.first_byte_at = self.reconnected_at = 0.0
        """0: not, or not yet."""
        self.error = ""
        """Why it failed, but for what an answer's status says."""
        self.overtaken = self.whole = False
        """Whether it was given up since the other attempt of a hedged request has an answer; whether all of its own
        has come."""
        self.head: Head | None = None
        """Its answer's, whether that was passed on or not."""
        self.meter = Meter()
        """The end of its answer, which says what that used."""

    @property
    def status(self) -> int:
        """That of the answer; 0: none came."""
        return 0 if self.head is None else self.head.status

    @property
    def usage(self) -> Usage | None:
        """What the answer says it used."""
        head = self.head
        if head is None:
            return None
        return self.meter.usage(head.chunked or head.mode is Mode.CHUNKED, head.events)

    def watching(self, taker: Taker) -> Taker:
        """See what the taker gets."""
        return _Watch(taker, self)

    def reconnects(self, now: float) -> None:
        """A kept connection was stale, and a new one takes its place."""
        self.reconnected_at = now

    def left(self, now: float, first_byte_at: float, whole: bool) -> None:
        """The worker is given back."""
        self.ended, self.first_byte_at, self.whole = now, first_byte_at, whole

    def over(self, gone: bool) -> None:
        """The request is: what has neither failed, nor been overtaken, nor an answer was ended by that."""
        if not (self.error or self.overtaken or self.whole):
            self.error = GONE if gone else BROKEN_OFF if self.head is not None else OTHER


class Spans:
    """One request that is recorded."""

    __slots__ = (
        "_recorder", "_said", "answer", "attempts", "began", "broken", "ended", "ended_ns", "gone", "model", "span",
        "status", "whole_at",
    )  # fmt: skip

    def __init__(self, recorder: Recorder, said: RequestHead) -> None:
        self._recorder, self._said = recorder, said
        self.span = recorder.new_id()
        self.attempts: list[Sending] = []
        self.began = self.ended = self.whole_at = 0.0
        self.ended_ns = 0
        """``ended`` on the wall's clock."""
        self.status = 0
        self.gone = self.broken = False
        self.model = ""
        self.answer: Sending | None = None
        """The attempt whose answer was passed on."""

    @property
    def trace(self) -> bytes:
        return self._said.trace.id

    @property
    def caller(self) -> bytes:
        """The client's span; empty where the trace is the router's."""
        return self._said.trace.caller

    @property
    def identity(self) -> bytes:
        return self._said.identity

    @property
    def path(self) -> str:
        return self._said.route.path

    @property
    def count(self) -> int:
        """Spans that it is."""
        return 1 + len(self.attempts)

    def whole(self, now: float) -> None:
        """All of it is here, and from now on it waits for a worker."""
        self.whole_at = now

    def sends(self, to: Upstream, span: bytes, now: float) -> Sending:
        """It goes there; ``span``: the id of what the worker gets as its parent."""
        attempt = Sending(span, to, now)
        self.attempts.append(attempt)
        return attempt

    def end(
        self, delivery: Delivery, last: Sending | None, whole: bool, gone: bool, model: str, began: float
    ) -> None:  # fmt: skip
        """It is over, and so is each attempt. ``last``: the one that counted; ``whole``: its answer is."""
        recorder = self._recorder
        self.status, self.gone, self.model, self.began = delivery.status, gone, model, began
        if delivery.head is not None:
            self.answer, self.broken = last, not whole and not gone
        self.ended, self.ended_ns = recorder.now(), recorder.wall_ns()
        for attempt in self.attempts:
            attempt.over(gone)
        recorder.put(self)


class Served:
    """One request that the router answers itself, and that is recorded. ``method`` and ``path`` as the client wrote
    them, ``path`` not beyond ``LONGEST_PATH``."""

    __slots__ = (
        "_gone", "_recorder", "began", "ended", "ended_ns", "identity", "method", "path", "route", "span", "status",
        "trace", "whole",
    )  # fmt: skip

    count: Final = 1
    """Spans that it is."""

    def __init__(self, recorder: Recorder, method: str, path: bytes, identity: bytes, trace: Trace) -> None:
        self._recorder, self.method, self.identity, self.trace = recorder, method, identity, trace
        self.path = path[:LONGEST_PATH].decode("latin-1")
        self.span, self.began = recorder.new_id(), recorder.now()
        self.ended = 0.0
        self.ended_ns = self.status = 0
        self.route = ""
        """The template that the path matched; empty for none."""
        self.whole = self._gone = False
        """Whether all of the answer is sent; whether the client has left."""

    @property
    def gone(self) -> bool:
        """Whether the client left before its answer was whole."""
        return self._gone and not self.whole

    @property
    def broken(self) -> bool:
        """Whether the router broke its answer off."""
        return not (self.whole or self._gone)

    def left(self) -> None:
        """The client did, as far as is known before the answer is whole."""
        self._gone = True

    def end(self, route: str) -> None:
        """It is over."""
        recorder, self.route = self._recorder, route
        self.ended, self.ended_ns = recorder.now(), recorder.wall_ns()
        recorder.put(self)


class _Watch:
    """A ``Taker`` before another."""

    __slots__ = ("_seen", "_taker")

    def __init__(self, taker: Taker, seen: Sending) -> None:
        self._taker, self._seen = taker, seen

    def came(self, head: Head | None, piece: bytes, ended: bool) -> None:
        if head is not None:
            self._seen.head = head
        if piece:
            self._seen.meter.feed(piece)
        self._taker.came(head, piece, ended)

    def malformed(self, reason: str) -> None:
        self._taker.malformed(reason)

    def broke(self, reason: str, stale: bool) -> None:
        self._taker.broke(reason, stale)


class Recorder:
    """One process's. ``most``: requests that wait to be exported."""

    def __init__(
        self, ratio: float, most: int, bits: Callable[[int], int], dropped: Callable[[float], None],
        now: Callable[[], float] = time.monotonic, wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:  # fmt: skip
        """``dropped`` is told of so many spans that were; ``now`` is the relay's clock."""
        self._below = round(ratio * (1 << 64))
        self._most, self._bits, self._dropped = most, bits, dropped
        self.now, self.wall_ns = now, wall_ns
        self._waiting: deque[Spans | Served] = deque()

    def begin(self, said: RequestHead) -> Spans | None:
        """A request's spans; None where it is not recorded, which its worker is told."""
        return Spans(self, said) if self._records(said.trace) else None

    def serves(self, method: str, path: bytes, identity: bytes, trace: Trace) -> Served | None:
        """The span of a request that begins now and that the router answers itself; None where it is not recorded."""
        return Served(self, method, path, identity, trace) if self._records(trace) else None

    def _records(self, trace: Trace) -> bool:
        if not trace.continued and int(trace.id[16:], 16) >= self._below:
            trace.parent = trace.parent[:-2] + b"00"
        return bool(int(trace.parent[-2:], 16) & SAMPLED)

    def new_id(self) -> bytes:
        return b"%016x" % (self._bits(64) or 1)

    def put(self, spans: Spans | Served) -> None:
        if len(self._waiting) >= self._most:
            self._dropped(spans.count)
            return
        self._waiting.append(spans)

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, most: int) -> list[Spans | Served]:
        """The oldest that wait."""
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
