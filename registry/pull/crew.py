"""The workers of one flight: each fetches one range at a time, from the upstream or from another process.

All state is under the flight's lock. A range that failed in a way that may pass is missing again, and waited for here.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import nullcontext
from typing import Final, Protocol

from helios.errors import DeadlineExceeded, HeliosError, Unavailable
from registry.pull import faults, upstream
from registry.pull.blocks import Blocks, Span
from registry.pull.following import Ranges
from registry.pull.remote import Relocated, Remote
from registry.pull.retry import Retry, Transient
from registry.pull.turns import Turns
from registry.pull.upstream import Upstream
from registry.pull.width import Width

log = logging.getLogger("helios.registry.pull")

LOOK_S: Final = 1.0
"""How often it is looked whether the upstream's rate limit still counts, in seconds."""
BUFFER: Final = 256 << 10
"""Bytes that a worker collects before it writes them."""


class Crewed(Protocol):
    """What workers need of a flight; all but ``write`` and ``rank`` with its lock held."""

    error: HeliosError | None

    @property
    def blocks(self) -> Blocks: ...

    @property
    def read(self) -> bool: ...

    @property
    def rank(self) -> int: ...

    def fail(self, error: HeliosError) -> None: ...

    def wake(self) -> None: ...

    def write(self, span: Span, data: memoryview, now: float) -> None: ...


class Crew:
    """Threads that come and go as there are ranges to fetch."""

    def __init__(
        self,
        flight: Crewed,
        client: Upstream,
        remote: Remote,
        connections: Turns,
        lock: threading.Condition,
        stop: threading.Event,
        *,
        paused: bool,
    ) -> None:
        """``paused``: nobody fetches until ``fetch_from`` says where from."""
        self._flight, self._client, self._remote, self._connections = flight, client, remote, connections
        self._changed, self._stop, self._paused = lock, stop, paused
        self._source: Ranges = remote
        self._retry = Retry(client.stall_s)
        self._width = Width(time.monotonic())
        self._workers = 0

    def staff(self) -> None:
        """Start as many workers as the width allows and the missing pieces need. With the lock held."""
        while self._workers < self._width.now_open and self._may_fetch():
            span = self._flight.blocks.next()
            if span is None:
                return
            self._workers += 1
            threading.Thread(target=self._work, args=(span,), name="pull-range", daemon=True).start()

    def fetch_from(self, source: Ranges | None) -> None:
        """Fetch from there from here on; None: from the upstream. With the lock held."""
        self._source = source or self._remote
        self._retry.progress()  # what was waited for until here is not the upstream's fault
        self.go_on()

    def go_on(self) -> None:
        """Nobody is held back any more. With the lock held."""
        self._paused = False
        self._flight.wake()
        self.staff()

    def drain(self, pausing: bool = False) -> None:
        """Wait until no worker is left; each ends within its request's deadline. ``pausing``: none begins either."""
        with self._changed:
            self._paused = self._paused or pausing
            while self._workers:
                self._changed.wait(1.0)

    def arrived(self, count: int, now: float) -> bool:
        """So many bytes came; returns whether from the upstream. With the lock held."""
        self._retry.progress()
        before = self._width.now_open
        self._width.arrived(count, now)
        if self._width.now_open > before:
            self.staff()
        return self._source is self._remote

    def _may_fetch(self) -> bool:
        """Whether ranges may be asked for: from others than the upstream only what readers want. Lock held."""
        wanted = self._source is self._remote or self._flight.read
        return wanted and not self._paused and not self._stop.is_set() and self._flight.error is None

    def _work(self, span: Span | None) -> None:
        buffer = memoryview(bytearray(BUFFER))
        try:
            while span is not None:
                try:
                    self._try(span, buffer)
                finally:
                    with self._changed:
                        self._flight.blocks.end(span)
                with self._changed:
                    going = self._workers <= self._width.now_open and self._may_fetch()
                    span = self._flight.blocks.next() if going else None
                    self.staff()
        except HeliosError as error:
            with self._changed:
                self._flight.fail(error)
        except Exception as error:
            log.exception("a range broke", extra={"where": str(self._remote.where)})
            with self._changed:
                self._flight.fail(HeliosError(f"the download of {self._remote.where} broke: {error!r}"))
        finally:
            with self._changed:
                self._workers -= 1
                self._flight.wake()

    def _try(self, span: Span, buffer: memoryview) -> None:
        """One request for a span. What may pass is waited for here; the rest of the span is missing again then."""
        source = self._source
        own = source is self._remote
        while own and (left := self._remote.limited_s) > 0:  # shorter as soon as another range is sent elsewhere
            slept = min(left, LOOK_S)
            with self._changed:
                self._retry.excuse(left, slept)
            upstream.sleep(slept, self._stop)
        problem: Transient | None = None
        try:
            with self._connections.turn(lambda: self._flight.rank, self._stop) if own else nullcontext():
                source.fetch(span, buffer, self._flight.write, self._stop)
        except Relocated:
            return
        except Transient as error:
            problem = error
        except (Unavailable, DeadlineExceeded) as error:
            if type(error) not in (Unavailable, DeadlineExceeded) or error.hint is not None:
                raise
            problem = faults.of_transport(error, self._remote.where)
        if problem is None:
            return
        if problem.wait_s is not None:
            self._client.gate.close_for(problem.wait_s)
        with self._changed:
            self._width.trouble(time.monotonic())
            delay = self._retry.failed(problem)
        log.warning("upstream trouble, trying again", extra={"problem": str(problem), "in_s": round(delay, 2)})
        upstream.sleep(delay, self._stop)
