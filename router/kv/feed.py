"""The adapter to one of vLLM's publishers: from its ZMQ sockets to the index.

A feed has a SUB socket, one that reports its connections, and, while it asks for a replay, a DEALER. All are read
without waiting, in steps, when it is the feed's turn (``router.kv.feeds``).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from router.kv.publishers import Publisher
from router.kv.sockets import Reader, prepare
from router.kv.stream import Stream
from router.kv.wire import BadEvent, read_batch, read_event, sequence_of

if TYPE_CHECKING:
    import zmq
    from msgspec import Raw

    from router.kv.feeds import Feeds

log = logging.getLogger("helios.router")

RECONNECT_MS: Final = (100, 5_000)
REPLAY_S: Final = 5.0
"""Longest silence while a replay is awaited, in seconds."""
AUDIT_S: Final = 30.0
"""Silence after which a publisher is asked whether there was more."""
ABSENT_S: Final = 15.0
"""Time without a connection after which nothing is believed."""


class Feed:
    """The messages of one publisher, from its sockets to the index. Also the stream's ``Sink``."""

    def __init__(self, feeds: Feeds, publisher: Publisher, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.publisher = publisher
        self.awake = False
        self.stream = Stream(self, replays=publisher.replay is not None)
        self._feeds, self._context = feeds, context
        self._pending: deque[tuple[int, Raw]] = deque()
        """Events that are not in the index yet, with the rank."""
        self._doing: Iterator[None] | None = None
        self._ranks: set[int] = set()
        self._connected = False
        self._since = feeds.clock()
        """When something came last, or the connection went."""
        self._replay: Reader | None = None
        self._replay_since = 0.0
        self._replay_brought = False
        self._gaps = 0
        self._published: float | None = None
        """When the last live batch that is not in the index yet was published, in the publisher's time of day."""
        self.lag_s = 0.0
        """How long after its publication the last live batch was in the index, as far as the clocks agree."""
        self._socket = self._subscribe()
        self._monitor = Reader(self._socket.get_monitor_socket(), self.woken)
        self._sub = Reader(self._socket, self.woken)
        try:
            self._socket.connect(publisher.endpoint)
        except Exception:
            self._close_sockets()
            raise

    @property
    def in_step(self) -> bool:
        """Whether everything that was published is in the index, as far as can be known."""
        return self._connected and not self.stream.asking and not self._pending and self._doing is None

    @property
    def followed(self) -> bool:
        """Whether the index has what was published, but for what is about to be taken in."""
        return self._connected and not self.stream.asking

    def described(self) -> dict[str, object]:
        """This publisher for people."""
        publisher, index = self.publisher, self._feeds.index
        return {
            "worker": publisher.worker,
            "endpoint": publisher.endpoint,
            "replay": publisher.replay,
            "connected": self._connected,
            "followed": self.followed,
            "blocks": sum(index.held_by(publisher.worker, rank) for rank in self._ranks),
            "behind": len(self._pending),
            "lag_s": round(self.lag_s, 3),
            "gaps": self._gaps,
        }

    def step(self) -> bool:
        """One piece of work; whether there is more."""
        if self._monitor.readable and (frames := self._monitor.read()) is not None:
            self._report(frames)
        elif self._doing is not None:
            if next(self._doing, self) is self:
                self._doing = None
                if not self._pending and self._published is not None:
                    self.lag_s = max(0.0, self._feeds.wall() - self._published)
                    self._published = None
        elif self._pending:
            self._begin(*self._pending.popleft())
        elif self._replay is not None and self._replay.readable and (frames := self._replay.read()) is not None:
            self._answered(frames)
        elif self._monitor.pending():
            pass  # a new connection's report comes before its messages
        elif self._sub.readable and (frames := self._sub.read()) is not None:
            self._came(frames)
        else:
            return False
        return True

    def look(self, now: float) -> None:
        """Look at the deadlines; ``now``: what the clock says."""
        if self._replay is not None:
            if now - self._replay_since > REPLAY_S:
                self._break_off()
        elif not self._connected:
            if now - self._since > ABSENT_S:
                self._since = now
                self.stream.lost()
        elif now - self._since > AUDIT_S:
            self._since = now
            self.stream.audit()

    def _break_off(self) -> None:
        """Wait no longer for a replay. Of a long one its socket may drop the end; what came before counts."""
        self._end_replay()
        if self._replay_brought:
            self._feeds.metrics.kv_replays.labels("partial").inc()
            self.stream.replay_ended()
        else:
            self._feeds.metrics.kv_replays.labels("failed").inc()
            log.warning(
                "a worker's KV events can't be had again",
                extra={"worker": self.publisher.worker, "replay": self.publisher.replay},
            )
            self.stream.replay_failed()
        self._feeds.wake(self)

    def close(self) -> None:
        """Close the sockets and claim nothing of this publisher any more."""
        self._end_replay()
        self._close_sockets()
        self.forget()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._sub.close()

    # --- what the stream orders ----------------------------------------------------------------------------------

    def take(self, payload: bytes) -> None:
        try:
            batch = read_batch(payload)
        except BadEvent as error:
            self._bad(error)
            return
        rank = batch.rank or 0
        if not self.stream.asking:  # what is replayed is old
            self._published = batch.ts
        self._pending.extend((rank, raw) for raw in batch.events)

    def forget(self) -> None:
        self._pending.clear()
        self._doing = self._published = None
        for rank in self._ranks:
            self._feeds.index.forget(self.publisher.worker, rank)
        self._ranks.clear()
        self._feeds.turn()  # what was forgotten is swept away in turns

    def ask(self, first: int) -> None:
        import zmq

        assert self.publisher.replay is not None
        self._end_replay()
        sock = self._context.socket(zmq.DEALER)
        prepare(sock)
        self._replay = Reader(sock, self.woken)
        self._replay_since, self._replay_brought = self._feeds.clock(), False
        sock.connect(self.publisher.replay)
        sock.send_multipart([b"", first.to_bytes(8, "big")], zmq.NOBLOCK)  # goes when there is a connection
        self._replay.wake()

    # --- what comes ----------------------------------------------------------------------------------------------

    def _subscribe(self) -> zmq.Socket[bytes]:
        import zmq

        sub = self._context.socket(zmq.SUB)
        prepare(sub)
        sub.set(zmq.RECONNECT_IVL, RECONNECT_MS[0])
        sub.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
        sub.setsockopt(zmq.SUBSCRIBE, self.publisher.topic.encode())
        return sub

    def _report(self, frames: Sequence[bytes]) -> None:
        """An event of the SUB socket's connection."""
        import zmq
        from zmq.utils.monitor import parse_monitor_message

        event = parse_monitor_message(list(frames))["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected, self._since = True, self._feeds.clock()
            self.stream.opened()
        elif event == zmq.EVENT_DISCONNECTED:
            self._connected, self._since = False, self._feeds.clock()
            self._end_replay()
            self.stream.closed()

    def _came(self, frames: Sequence[bytes]) -> None:
        """A published message."""
        self._since = self._feeds.clock()
        self._numbered(frames[1:] if len(frames) == 3 else (), self.stream.live)
        if new := self.stream.gaps - self._gaps:
            self._gaps += new
            self._feeds.metrics.kv_gaps.inc(new)

    def _answered(self, frames: Sequence[bytes]) -> None:
        """A message of a replay: an empty frame, in newer versions the topic, number, payload; number -1 at the end."""
        self._since = self._replay_since = self._feeds.clock()
        self._numbered(frames[-2:] if len(frames) in (3, 4) else (), self._replayed)

    def _numbered(self, frames: Sequence[bytes], then: Callable[[int, bytes], None]) -> None:
        try:
            if len(frames) != 2:
                raise BadEvent("a message of another form")
            number = sequence_of(frames[0])
        except BadEvent as error:
            self._bad(error)
            return
        then(number, frames[1])

    def _replayed(self, number: int, payload: bytes) -> None:
        if number >= 0:
            self._replay_brought = True
            self.stream.replayed(number, payload)
            return
        self._feeds.metrics.kv_replays.labels("done").inc()
        self._end_replay()
        self.stream.replay_ended()

    def _begin(self, rank: int, raw: Raw) -> None:
        """Start with an event; ``step`` goes on with it."""
        index = self._feeds.index
        try:
            event = read_event(raw)
        except BadEvent as error:
            self._bad(error)
            return
        if event is None:
            index.skipped["unknown"] += 1
            return
        self._ranks.add(rank)
        self._feeds.metrics.kv_events.labels(type(event).__name__.lower()).inc()
        self._doing = event.act(index.rank(self.publisher.worker, rank))

    def _bad(self, error: BadEvent) -> None:
        """What can't be read may have been a removal, so nothing that was said before counts."""
        self._feeds.index.skipped["malformed"] += 1
        log.warning(
            "a worker's KV events can't be read", extra={"worker": self.publisher.worker, "reason": str(error)[:300]}
        )
        self.forget()

    def _end_replay(self) -> None:
        reader, self._replay = self._replay, None
        if reader is not None:
            reader.close()

    def woken(self) -> None:
        self._feeds.wake(self)
