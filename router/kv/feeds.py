"""The feeds of all workers, and their share of the event loop.

A turn does as many steps of feeds as fit into ``TURN_S``; after it the loop is left alone for as long. So any number
of workers costs the router at most half of its time, a millisecond at once, and what can't be worked off stays in the
sockets, where ZMQ drops what is too much: a gap, which the stream sees.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from router.kv.feed import Feed
from router.kv.index import KvIndex
from router.kv.publishers import Publisher, check_endpoint

if TYPE_CHECKING:
    import zmq

    from helios.metrics import RouterMetrics

log = logging.getLogger("helios.router")

TURN_S: Final = 0.001
"""Longest turn at the event loop, in seconds; the last step of a turn may go beyond by a fraction of it."""
SOCKETS: Final = 1 << 16
"""Most sockets: three for a publisher. libzmq's own bound is 1023."""


class Feeds:
    """The feeds of all workers, and their share of the event loop. ``running`` owns the sockets."""

    def __init__(
        self, index: KvIndex, metrics: RouterMetrics, clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """``clock`` and ``wall`` give seconds; ``wall`` is compared with the publishers' own time of day."""
        self.index, self.metrics, self.wall = index, metrics, wall
        self.clock = clock  # not the loop's, which in uvloop stands still while a callback runs
        self._feeds: dict[str, Feed] = {}
        self._of: dict[str, list[Feed]] = {}
        """By worker."""
        self._followed: frozenset[str] | None = None
        """What ``followed`` gives, until something changes."""
        self._ready: deque[Feed] = deque()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._turn: asyncio.Handle | None = None
        self._watch: asyncio.TimerHandle | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Feeds can be added while the context lasts; it is entered and left in the event loop."""
        import zmq

        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, SOCKETS)
        self._look()
        metrics = self.metrics
        metrics.kv_blocks.set_function(lambda: self.index.held)
        metrics.kv_feeds.set_function(lambda: sum(feed.in_step for feed in self._feeds.values()))
        metrics.kv_lag.set_function(lambda: max((feed.lag_s for feed in self._feeds.values()), default=0.0))
        try:
            yield
        finally:
            for endpoint in list(self._feeds):
                self._close(endpoint)
            for timer in (self._turn, self._watch):
                if timer is not None:
                    timer.cancel()
            self._turn = self._watch = None
            self._context.destroy(linger=0)
            self._context = None

    def set(self, publishers: Sequence[Publisher]) -> None:
        """Follow these publishers and no others. Raises UsageError for an endpoint that can't be one.

        One for which there is no socket left is tried again at the next call.
        """
        import zmq

        wanted = {one.endpoint: one for one in publishers}
        for one in publishers:
            if one.endpoint not in self._feeds:
                for endpoint in (one.endpoint, one.replay):
                    if endpoint is not None:
                        check_endpoint(endpoint)
        for endpoint, feed in list(self._feeds.items()):
            if wanted.get(endpoint) != feed.publisher:
                self._close(endpoint)
        for endpoint, publisher in wanted.items():
            if endpoint not in self._feeds:
                assert self._context is not None, "feeds are set while they run"
                try:
                    feed = Feed(self, publisher, self._context)
                except zmq.ZMQError as error:
                    extra = {"worker": publisher.worker, "endpoint": endpoint, "reason": str(error)}
                    log.error("a worker's KV events can't be followed", extra=extra)
                    continue
                self._feeds[endpoint] = feed
                self._of.setdefault(publisher.worker, []).append(feed)
        self._followed = None

    def in_step(self, worker: str) -> bool:
        """Whether everything that the worker has published is in the index, as far as can be known."""
        feeds = self._of.get(worker, ())
        return bool(feeds) and all(feed.in_step for feed in feeds)

    @property
    def followed(self) -> frozenset[str]:
        """Workers of which the index knows what they hold, but for what was just published."""
        if self._followed is None:
            self._followed = frozenset(
                worker for worker, feeds in self._of.items() if all(feed.followed for feed in feeds)
            )
        return self._followed

    def described(self) -> list[dict[str, object]]:
        """Each publisher for people, those that are not followed first."""
        feeds = sorted(self._feeds.values(), key=lambda feed: (feed.followed, feed.publisher.worker))
        return [feed.described() for feed in feeds]

    def wake(self, feed: Feed) -> None:
        """There may be work for a feed."""
        if not feed.awake:
            feed.awake = True
            self._ready.append(feed)
        self.turn()

    def turn(self) -> None:
        """Have a turn at the loop soon."""
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._work)

    def _close(self, endpoint: str) -> None:
        feed = self._feeds.pop(endpoint)
        feeds = self._of[feed.publisher.worker]
        feeds.remove(feed)
        if not feeds:
            del self._of[feed.publisher.worker]
        feed.close()
        if feed.awake:
            self._ready.remove(feed)

    def _work(self) -> None:
        end = self.clock() + TURN_S
        swept = False
        try:
            while (self._ready or not swept) and self.clock() < end:
                swept = not self.index.sweep()
                if self._ready:
                    feed = self._ready.popleft()
                    feed.awake = False
                    if feed.step():
                        self.wake(feed)
        finally:
            more = self._ready or not swept
            self._turn = asyncio.get_running_loop().call_later(TURN_S, self._work) if more else None
            self._followed = None
        self._count_skipped()

    def _count_skipped(self) -> None:
        skipped = self.index.skipped
        for reason, count in skipped.items():
            self.metrics.kv_skipped.labels(reason).inc(count)
        skipped.clear()
        self.metrics.kv_forgotten.inc(self.index.forgotten)
        self.index.forgotten = 0

    def _look(self) -> None:
        """Look at all deadlines, once a second."""
        now = self.clock()
        for feed in self._feeds.values():
            feed.look(now)
        self._followed = None
        self._watch = asyncio.get_running_loop().call_later(1.0, self._look)
