"""One request at a relay whose client, workers and clock are the test's: everything between them is the real thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

from helios.config import FallbackRule, HedgingSettings, RetrySettings, RouterSettings
from helios.metrics import RouterMetrics
from router.kv.asking import Told
from router.kv.dialogue import Answer
from router.relay.exchange import Exchange
from router.relay.framing import BadAnswer, Framing
from router.relay.protocol import RelayProtocol
from router.relay.relay import Relay
from router.relay.upstream import Asker, Connection, Upstream
from router.resilience.guard import Guard
from router.resilience.resilience import Resilience
from router.routes import RAW_ROUTES
from router.scheduling.configured import policy_of
from router.tracing.recorder import Recorder
from router.workers import Worker, Workers, parse_worker

CHAT, EMBED = b"/v1/chat/completions", b"/v1/embeddings"
WORKERS = ("m=http://a:1", "m=http://b:1/base", "n=http://c:1")
TRACEPARENT = b"traceparent: 00-%032x-%016x-01\r\n" % (10, 10)
BODY = json.dumps({"model": "m", "messages": []}).encode()
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b"d\r\ndata: hello\n\n\r\n"
LAST = b"0\r\n\r\n"


class Transport:
    """The client's: what was written to it, and how it ended."""

    def __init__(self) -> None:
        self.written = b""
        self.ended = ""

    def write(self, data: bytes) -> None:
        assert not self.ended
        self.written += data

    def abort(self) -> None:
        self.ended = self.ended or "aborted"


class Flow:
    """Whether the client's connection is read."""

    def __init__(self) -> None:
        self.paused = False

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Client:
    """Stands for the client's connection."""

    def __init__(self) -> None:
        self.transport = Transport()
        self.flow = Flow()
        self.over: list[Exchange] = []

    def close_soon(self) -> None:
        self.transport.ended = self.transport.ended or "closed"

    def answered(self, exchange: Exchange) -> None:
        self.over.append(exchange)


class FakeConnection:
    """Stands for a connection to a worker: its framing is the real one."""

    def __init__(self, reused: bool) -> None:
        self.framing = Framing()
        self.reused, self.asker, self.told = reused, cast(Asker | None, None), False
        self.asked = b""
        self.paused = False
        self.ended = ""

    def ask(self, asker: Asker, head: bytes, body: bytes, spool: object, http11: bool) -> None:
        assert not self.ended
        self.asker, self.asked, self.told = asker, head + body, False
        self.framing.begin(http11)

    def free(self) -> None:
        head = self.framing.head
        self.asker, self.ended = None, "kept" if self.framing.ended and head and head.keep_alive else "aborted"

    def abort(self) -> None:
        self.asker, self.ended = None, "aborted"

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def comes(self, data: bytes) -> None:
        """Bytes of the answer, as ``Connection`` tells of them."""
        asker = self.asker
        assert asker is not None
        try:
            piece = self.framing.feed(data)
        except BadAnswer as error:
            self.asker, self.ended = None, "aborted"
            asker.malformed(str(error))
            return
        if self.told:
            asker.came(None, piece, self.framing.ended)
        elif self.framing.head is not None:
            self.told = True
            asker.came(self.framing.head, piece, self.framing.ended)

    def breaks(self, stale: bool) -> None:
        asker, self.asker, self.ended = self.asker, None, "lost"
        assert asker is not None
        asker.broke("it broke", stale and self.reused and self.framing.fresh)


class Connecting:
    def __init__(self, asker: Asker) -> None:
        self.asker: Asker | None = asker

    def cancel(self) -> None:
        self.asker = None


class FakePool:
    """Connections as a test wants them."""

    def __init__(self) -> None:
        self.has_idle = False
        self.forgotten: list[Worker] = []
        self.made: list[FakeConnection] = []
        self.connecting: list[Connecting] = []

    def idle(self, worker: Upstream) -> FakeConnection | None:
        return self.connection(reused=True) if self.has_idle else None

    def connect(self, worker: Upstream, asker: Asker) -> Connecting:
        self.connecting.append(Connecting(asker))
        return self.connecting[-1]

    def forget(self, worker: Worker) -> None:
        self.forgotten.append(worker)

    def connection(self, reused: bool) -> FakeConnection:
        self.made.append(FakeConnection(reused))
        return self.made[-1]


class FakeIndex:
    """The index of KV events: who asked is told when the test says so, also when nobody waits any more."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def ask(self, path: str, model: str, intake: object, told: Told) -> bool:
        if model != "m":
            return False
        self.told.append(told)
        return True

    def says(self, answer: Answer | None) -> None:
        self.told.pop()(answer)


class Timer:
    """What is called when its time has come, unless it is cancelled."""

    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at, self.call = at, call
        self.over = False

    def cancel(self) -> None:
        self.over = True


class Scene:
    """A relay with two workers, and one request."""

    def __init__(
        self, *, http11: bool = True, keep_alive: bool = True, expects: bool = False, path: bytes = CHAT,
        retries: RetrySettings | None = None, fallbacks: Sequence[FallbackRule] = (), renames: bool = False,
        hedging: HedgingSettings | None = None, workers: Sequence[str] = WORKERS, urgent: bool = True,
        kind: bytes = b"application/json", bits: Callable[[int], int] = lambda count: 10,
        tracing: Recorder | None = None,
    ) -> None:  # fmt: skip
        self.now = 100.0
        self.timers: list[Timer] = []
        self.metrics = RouterMetrics()
        self.settings = RouterSettings(
            idle_timeout_s=10, first_byte_timeout_s=60, connect_timeout_s=5, retries=retries or RetrySettings(),
            fallbacks=list(fallbacks), answer_model="asked" if renames else "served",
            hedging=hedging or HedgingSettings(),
        )  # fmt: skip
        self.resilience = Resilience(self.settings, self.metrics, lambda: self.now, lambda: 0.5)
        self.workers = Workers([parse_worker(text) for text in workers], lambda: self.now, guard=self.resilience.guard)
        policy = policy_of("least-requests")
        self.relay = Relay(self.settings, self.workers, policy, self.metrics, self.resilience)
        self.relay.now = lambda: self.now
        self.relay.later = self._later
        self.relay.bits, self.relay.tracing = bits, tracing
        self.pool = FakePool()
        self.relay.pool = cast(Any, self.pool)
        self.index = FakeIndex()
        self.client = Client()
        raw = [(b"host", b"h"), (b"content-type", kind), (b"x-request-id", b"id-1")]
        if renames:
            raw.append((b"accept-encoding", b"gzip"))
        self.exchange = Exchange(
            self.relay, cast(RelayProtocol, self.client), RAW_ROUTES[path], b"", raw,
            http11=http11, keep_alive=keep_alive, expects=expects, urgent=urgent,
        )  # fmt: skip

    def _later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + seconds, call))
        return self.timers[-1]

    def later(self, seconds: float) -> None:
        """Time passes: timers whose time has come are called, then the relay looks at what is due."""
        self.now += seconds
        for timer in self.timers:
            if not timer.over and timer.at <= self.now:
                timer.over = True
                timer.call()
        self.relay.look(self.now)

    def counted(self, name: str, **labels: str) -> float:
        """A counter of the router's metrics."""
        return self.metrics.registry.get_sample_value(f"helios_router_{name}_total", labels) or 0.0

    def started(self, *, idle: bool = False) -> Scene:
        """With the body here and its turn."""
        self.pool.has_idle = idle
        self.exchange.begin()
        self.exchange.feed(BODY)
        self.exchange.complete()
        return self

    def connected(self) -> FakeConnection:
        """A new connection is there."""
        connection = self.pool.connection(reused=False)
        self.connecting().connected(cast(Connection, connection))
        return connection

    def connecting(self) -> Asker:
        """Who waits for a connection: it is told, once."""
        one = self.pool.connecting[-1]
        asker, one.asker = one.asker, None
        assert asker is not None
        return asker

    @property
    def text(self) -> bytes:
        return self.client.transport.written

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in [*self.workers.all, *self.workers.draining])

    def settled(self) -> None:
        """Nothing is held any more."""
        assert self.exchange.response_complete
        assert self.in_flight == 0
        assert not self.workers.draining
        assert self.relay.budget.used == 0
        assert not self.relay.active
        assert not self.relay.dispatches
        assert all(connection.asker is None for connection in self.pool.made)
        assert all(one.asker is None for one in self.pool.connecting)
        assert all(guard.life.waiting == 0 for guard in self.guards)
        assert all(timer.over for timer in self.timers)

    @property
    def guards(self) -> list[Guard]:
        endpoints = self.resilience.fallbacks.endpoints
        return [worker.guard for worker in self.workers.all] + [endpoint.guard for endpoint in endpoints]
