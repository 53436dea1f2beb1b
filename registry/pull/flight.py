"""One file on its way from the upstream to the store: fetched in ranges, read while it comes, stored as it comes.

    workers, one a range ---> partial file (spool) ---> readers, by sendfile
                                    |
                                    +-------------> ingest: hashes and stores; its end is what verifies the file

The flight's own thread ingests: a large file in order while the last of it comes, a small one when it is whole. Only
when the ingest has returned, the hash is right and the last block is let go. Wrong bytes are thrown away and everything
is fetched once more; wrong again, the flight fails.

``_changed`` guards all state but the bytes. It is held for a few instructions, never while anything is read, written
or waited for; the journal of blocks is written after the state says so, by the thread that brought them.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from helios.errors import (
    DeadlineExceeded,
    HeliosError,
    IntegrityError,
    InvalidInput,
    Unavailable,
)
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.ingest import Source
from registry.pull import faults, upstream
from registry.pull.blocks import PIECE, Blocks, Span
from registry.pull.faults import again
from registry.pull.listing import RemoteFile
from registry.pull.reading import FlightSource, Reader, View
from registry.pull.remote import FLUSH_S, Relocated, Remote
from registry.pull.retry import Retry, Transient
from registry.pull.spool import Partial
from registry.pull.upstream import Stopped, Token, Upstream
from registry.pull.width import Width

log = logging.getLogger("helios.registry.pull")

BUFFER: Final = 256 << 10
"""Bytes that a worker collects before it writes them."""
TRIES: Final = 2
"""Times a file is fetched whole when its bytes turn out wrong."""
NEAR_S: Final = 60.0
"""A large file is ingested from when the rest of it is expected within so many seconds."""
IDLE_S: Final = 30.0
"""A flight that need not finish ends when nobody has wanted it for so long, in seconds."""

_numbers = itertools.count()

Ingest = Callable[[Source], FileEntry]


class Landed(Exception):
    """The file is in the store: read it there."""


class Flight:
    """The download of one file; see the module. Made and run by ``Flights``."""

    def __init__(
        self,
        client: Upstream,
        repo: RepoId,
        commit: str,
        file: RemoteFile,
        partial: Partial,
        connections: threading.BoundedSemaphore,
        *,
        finish: bool,
        fetched: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.repo, self.commit, self.file = repo, commit, file
        self.entry: FileEntry | None = None
        self.error: HeliosError | None = None
        self.attempt = 1
        self.ended = threading.Event()
        """Its thread has let go of everything."""
        self._client, self._partial, self._connections, self._finish = client, partial, connections, finish
        self._remote = Remote(client, repo, commit, file)
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._blocks = Blocks(file.size)
        self._opened = False
        self._retry = Retry(client.stall_s)
        self._width = Width(time.monotonic())
        self._workers = 0
        self._wakes: dict[int, Callable[[], None]] = {}
        self._wanted = 0
        self._idle_since = time.monotonic()
        self._waked = 0.0
        self._fetched = fetched
        self._came, self._came_since = 0, time.monotonic()
        self._ran = self._closed = False

    @classmethod
    def landed(
        cls, client: Upstream, repo: RepoId, commit: str, file: RemoteFile, partial: Partial, entry: FileEntry
    ) -> Flight:
        """One for a file that the store has already."""
        flight = cls(client, repo, commit, file, partial, threading.BoundedSemaphore(1), finish=True)
        flight.entry, flight._closed = entry, True
        return flight

    # --- for whoever wants the file ----------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether it has succeeded (``entry``) or failed (``error``)."""
        return self.entry is not None or self.error is not None

    @property
    def limited_s(self) -> float:
        """Seconds until the upstream's rate limit lets anybody ask again."""
        return self._client.gate.left()

    def add_token(self, token: Token) -> None:
        """The bytes may be fetched with this token."""
        self._remote.add_token(token)

    @contextmanager
    def reading(self, offset: int, wake: Callable[[], None]) -> Iterator[Reader]:
        """A reader from ``offset`` on; ``wake`` is called from any thread when there may be something new.

        Raises Landed when the partial file has been let go.
        """
        number = next(_numbers)
        with self._changed:
            if self._closed:
                raise Landed
            self._wanted += 1
            self._wakes[number] = wake
            self._blocks.want(number, offset)
        reader = Reader(self, number)
        try:
            yield reader
        finally:
            reader.close()
            with self._changed:
                del self._wakes[number]
                self._blocks.want(number, None)
                self._unwanted()
                self._let_go()

    def view(self, number: int, offset: int, attempt: int | None) -> View | None:
        """What a reader that needs ``offset`` may read now, None when nothing yet; raises what the flight fails with.

        ``attempt`` is the one whose file the reader has.
        """
        with self._changed:
            if self.error is not None:
                raise again(self.error)
            self._blocks.want(number, offset)
            if not self._opened or (end := self._blocks.ready(offset)) <= offset:
                return None
            return View(self.attempt, end, None if attempt == self.attempt else self._partial.duplicate())

    def wait(self, stop: threading.Event, advance: Callable[[int, int], None]) -> FileEntry:
        """Wait until the file is stored; ``advance`` hears (bytes here, attempt). Raises what the flight fails with."""
        told = None
        with self._changed:
            self._wanted += 1
        try:
            while True:
                with self._changed:
                    if not self.over:
                        self._changed.wait(0.1)
                    now = (self._blocks.here, self.attempt)
                    entry, error = self.entry, self.error
                if now != told:
                    advance(*now)
                    told = now
                if entry is not None:
                    return entry
                if error is not None:
                    raise again(error)
                if stop.is_set():
                    raise Stopped
        finally:
            with self._changed:
                self._unwanted()

    def stop(self) -> None:
        """End it soon; what is here stays in the spool."""
        self._stop.set()
        with self._changed:
            self._notify()

    # --- the flight's thread -----------------------------------------------------------------------------------------

    def run(self, ingest: Ingest, stored: Callable[[FileEntry], None]) -> None:
        """Bring the file; ``stored`` is told before anybody else. Never raises: ``entry`` or ``error`` is set."""
        try:
            here = self._partial.open()
            with self._changed:
                self._blocks = self._blocks.again(here)
                self._opened = True
            entry = self._bring(ingest)
            stored(entry)
            self._end(entry, None)
            self._partial.unlink()
        except HeliosError as error:
            self._end(None, error)
        except Exception as error:
            log.exception("a download broke", extra={"repo": str(self.repo), "file": self.file.path})
            self._end(None, HeliosError(f"the download of {self.file.path} broke: {error!r}"))
        finally:
            self._drain()
            with self._changed:
                self._ran = True
                self._let_go()

    def _let_go(self) -> None:
        """Close the partial file when nobody reads it any more. With the lock held."""
        if self._ran and not self._wakes and not self._closed:
            self._closed = True
            self._partial.close()

    def _bring(self, ingest: Ingest) -> FileEntry:
        for attempt in range(1, TRIES + 1):
            with self._changed:
                self.attempt = attempt
                self._staff()
            try:
                if self.file.size <= PIECE:
                    self._until_whole()
                else:
                    self._until_near()
                return ingest(FlightSource(self))
            except (IntegrityError, InvalidInput) as error:
                if self.error is not None:
                    raise self.error from None
                self._until_whole()
                if self._as_listed():
                    raise  # the upstream's own file is malformed, or our store has a problem
                log.warning(
                    "the upstream sent wrong bytes",
                    extra={"repo": str(self.repo), "commit": self.commit, "file": self.file.path, "attempt": attempt},
                )
                self._drain()
                with self._changed:
                    self._partial.remove()  # readers have descriptors of their own
                    self._opened = False
                if attempt == TRIES:
                    raise IntegrityError(
                        f"{self.file.path} of {self.repo.id}@{self.commit}: the upstream's bytes are not those it "
                        f"lists ({self.file.key}); downloaded {TRIES} times",
                        hint="Nothing was published. Try again later, or tell whoever runs the upstream.",
                    ) from error
                self._partial.open()
                self._remote.move()
                with self._changed:
                    self._blocks = self._blocks.again(())
                    self._opened, self.attempt = True, attempt + 1
                    self._notify()
        raise AssertionError("unreachable")

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """For the ingest: bytes from ``offset`` on, as soon as some are here; 0 at the file's end."""
        if offset >= self.file.size:
            return 0
        with self._changed:
            self._blocks.want(-1, offset)
            while (end := self._blocks.ready(offset, held_back=False)) <= offset:
                self._check()
                self._changed.wait(0.2)
            self._check()
        return self._partial.read_into(buffer[: end - offset], offset)

    def _until_whole(self) -> None:
        with self._changed:
            while not self._blocks.whole:
                self._check()
                self._changed.wait(0.2)

    def _until_near(self) -> None:
        """Wait until the rest will be here soon: an ingest holds buffers, of which there are few for all."""
        with self._changed:
            while not self._blocks.whole:
                self._check()
                passed = max(time.monotonic() - self._came_since, 0.01)
                if self.file.size - self._blocks.here < NEAR_S * self._came / passed:
                    return
                self._changed.wait(0.2)

    def check(self) -> None:
        """Raise what ends the flight, if something does."""
        with self._changed:
            self._check()

    def _check(self) -> None:
        """Raise what ends the flight, if something does. With the lock held."""
        if self.error is not None:
            raise self.error
        idle = not self._finish and not self._wanted and time.monotonic() - self._idle_since > IDLE_S
        if self._stop.is_set() or idle:
            raise Stopped

    def _end(self, entry: FileEntry | None, error: HeliosError | None) -> None:
        with self._changed:
            self.entry = entry
            self.error = None if entry is not None else self.error or error
            self._blocks.verified = entry is not None
            self._stop.set()
            self._notify()

    def _drain(self) -> None:
        """Wait until no worker is left; each ends within its request's deadline."""
        with self._changed:
            while self._workers:
                self._changed.wait(1.0)

    def _as_listed(self) -> bool:
        """Whether the downloaded bytes have the hash that the upstream lists."""
        digest, buffer, offset = self.file.hasher(), memoryview(bytearray(1 << 20)), 0
        while offset < self.file.size and (count := self._partial.read_into(buffer, offset)):
            digest.update(buffer[:count])
            offset += count
        return digest.hexdigest() == (self.file.sha256 or self.file.git_oid)

    # --- workers -----------------------------------------------------------------------------------------------------

    def _staff(self) -> None:
        """Start as many workers as the width allows and the missing pieces need. With the lock held."""
        while self._workers < self._width.now_open and not self._stop.is_set() and self.error is None:
            span = self._blocks.next()
            if span is None:
                return
            self._workers += 1
            threading.Thread(target=self._work, args=(span,), name="pull-range", daemon=True).start()

    def _work(self, span: Span | None) -> None:
        buffer = memoryview(bytearray(BUFFER))
        try:
            while span is not None:
                try:
                    self._try(span, buffer)
                finally:
                    with self._changed:
                        self._blocks.end(span)
                with self._changed:
                    going = self._workers <= self._width.now_open and not self._stop.is_set() and self.error is None
                    span = self._blocks.next() if going else None
                    self._staff()
        except HeliosError as error:
            with self._changed:
                self.error = self.error or error
        except Exception as error:
            log.exception("a range broke", extra={"repo": str(self.repo), "file": self.file.path})
            with self._changed:
                self.error = self.error or HeliosError(f"the download of {self.file.path} broke: {error!r}")
        finally:
            with self._changed:
                self._workers -= 1
                self._notify()

    def _try(self, span: Span, buffer: memoryview) -> None:
        """One request for a span. What may pass is waited for here; the rest of the span is missing again then."""
        waited = self._client.gate.left()
        with self._changed:
            self._retry.excuse(waited)
        upstream.sleep(waited, self._stop)
        while not self._connections.acquire(timeout=0.2):
            upstream.sleep(0, self._stop)
        problem: Transient | None = None
        try:
            self._remote.fetch(span, buffer, self._write, self._stop)
        except Relocated:
            return
        except Transient as error:
            problem = error
        except (Unavailable, DeadlineExceeded) as error:
            if type(error) not in (Unavailable, DeadlineExceeded) or error.hint is not None:
                raise
            problem = faults.of_transport(error, self._remote.where)
        finally:
            self._connections.release()
        if problem is None:
            return
        if problem.wait_s is not None:
            self._client.gate.close_for(problem.wait_s)
        with self._changed:
            self._width.trouble(time.monotonic())
            delay = self._retry.failed(problem)
        log.warning("upstream trouble, trying again", extra={"problem": str(problem), "in_s": round(delay, 2)})
        upstream.sleep(delay, self._stop)

    def _write(self, span: Span, data: memoryview, now: float) -> None:
        self._partial.write(data, span.at)
        with self._changed:
            numbers = list(self._blocks.advance(span, span.at + len(data)))
            self._retry.progress()
            self._came += len(data)
            before = self._width.now_open
            self._width.arrived(len(data), now)
            if self._width.now_open > before:
                self._staff()
            if numbers or now - self._waked > FLUSH_S:
                self._notify()
        self._partial.done(numbers)
        self._fetched(len(data))

    def _notify(self) -> None:
        """Wake everybody. With the lock held."""
        self._waked = time.monotonic()
        self._changed.notify_all()
        for wake in self._wakes.values():
            wake()

    def _unwanted(self) -> None:
        self._wanted -= 1
        self._idle_since = time.monotonic()
