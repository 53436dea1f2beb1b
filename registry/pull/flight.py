"""One file on its way from the upstream to the store: fetched in ranges, read while it comes, stored as it comes.

    workers, one a range ---> partial file (spool) ---> readers, by sendfile
                                    |
                                    +-------------> ingest: hashes and stores; its end is what verifies the file

The flight's own thread ingests: of a large file while it comes, in order; of a small one when it is whole. Only when
the ingest has returned, the hash is right and the last block is let go. Wrong bytes are thrown away and everything is
fetched once more; wrong again, the flight fails.

``_changed`` guards all state but the bytes. It is held for a few instructions, never while anything is read, written
or waited for; the journal of blocks is written after the state says so, by the thread that brought them.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final

from helios.errors import (
    DeadlineExceeded,
    Forbidden,
    HeliosError,
    IntegrityError,
    InvalidInput,
    NotFound,
    Unavailable,
)
from helios.http.response import Response
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.ingest import Source
from registry.pull import faults, upstream
from registry.pull.blocks import PIECE, Blocks, Span
from registry.pull.listing import RemoteFile
from registry.pull.origins import Target
from registry.pull.retry import Retry, Transient
from registry.pull.spool import Partial
from registry.pull.upstream import Stopped, Token, Upstream
from registry.pull.width import Width

log = logging.getLogger("helios.registry.pull")

BUFFER: Final = 256 << 10
"""Bytes that a worker collects before it writes them."""
FLUSH_S: Final = 0.05
"""It writes sooner when they come slowly."""
TRIES: Final = 2
"""Times a file is fetched whole when its bytes turn out wrong."""
TOKENS: Final = 8
"""Callers' tokens that a flight remembers: one may be refused where another is not."""
IDLE_S: Final = 30.0
"""A flight that need not finish ends when nobody has wanted it for so long, in seconds."""
XET_ONLY: Final = 50 * 1000**3
"""The Hub's CDN refuses larger files over plain HTTP; mirrors and other registries need not."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)\Z")
_numbers = itertools.count()

Ingest = Callable[[Source], FileEntry]


class Landed(Exception):
    """The file is in the store: read it there."""


class Relocated(Exception):
    """The place that the upstream redirected to does not serve the file any more; ask the upstream again."""


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
    ) -> None:
        self.repo, self.commit, self.file = repo, commit, file
        self.entry: FileEntry | None = None
        self.error: HeliosError | None = None
        self.attempt = 1
        self.ended = threading.Event()
        """Its thread has let go of everything."""
        self._client, self._partial, self._connections, self._finish = client, partial, connections, finish
        self._where = faults.Where(client.endpoint, repo, commit, file.path)
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._blocks = Blocks(file.size)
        self._opened = False
        self._retry = Retry(client.stall_s)
        self._width = Width(time.monotonic())
        self._workers = 0
        self._tokens: list[Token] = []
        self._location: Target | None = None
        self._wakes: dict[int, Callable[[], None]] = {}
        self._wanted = 0
        self._idle_since = time.monotonic()
        self._waked = 0.0
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
        with self._changed:
            if token not in self._tokens:
                self._tokens = [token, *self._tokens][:TOKENS]

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

    def give_up(self) -> None:
        """It never came to run."""
        self._end(None, Stopped())

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
                with self._changed:
                    self._blocks = self._blocks.again(())
                    self._location, self._opened, self.attempt = None, True, attempt + 1
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
        file, offset = self.file, 0
        digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        buffer = memoryview(bytearray(1 << 20))
        while offset < file.size and (count := self._partial.read_into(buffer, offset)):
            digest.update(buffer[:count])
            offset += count
        return digest.hexdigest() == (file.sha256 or file.git_oid)

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
            self._fetch(span, buffer)
        except Relocated:
            return
        except Transient as error:
            problem = error
        except (Unavailable, DeadlineExceeded) as error:
            if type(error) not in (Unavailable, DeadlineExceeded) or error.hint is not None:
                raise
            problem = faults.of_transport(error, self._where)
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

    def _fetch(self, span: Span, buffer: memoryview) -> None:
        with self._changed:
            known, token = self._location, self._tokens[0] if self._tokens else None
        partly = span.start > 0 or span.stop < self.file.size
        headers = {"range": f"bytes={span.start}-{span.stop - 1}"} if partly else {}
        target = known or self._client.file_target(self.repo, self.commit, self.file.path)
        response, at = self._client.open(target, token, headers, upstream.TIMEOUT_S)
        with response:
            if response.status >= 400:
                self._refused(response, known, token)
            self._check_head(response, span, partly)
            with self._changed:
                self._location = None if self._client.origins.trusted(at.origin) else at
            self._receive(response, span, buffer)
        if span.at < span.stop and not self._stop.is_set():
            raise Transient(
                f"{self._where}: the answer ended after {span.at - span.start} of {span.stop - span.start} bytes"
            )

    def _refused(self, response: Response, known: Target | None, token: Token) -> None:
        """Raises what an error status means."""
        status = response.status
        if known is not None and status not in faults.PASSING:
            with self._changed:
                if self._location == known:
                    self._location = None
            raise Relocated  # a signed URL ends after a while
        if status == 416:
            raise Transient(
                f"{self._where}: the upstream says that it has fewer bytes than the {self.file.size} it lists"
            )
        found = faults.of_status(status, response.headers, self._where, time.time())
        if isinstance(found, Forbidden | NotFound):
            with self._changed:
                if token in self._tokens and len(self._tokens) > 1:
                    self._tokens.remove(token)
                    raise Relocated  # another caller's token may do
        if self.file.size > XET_ONLY and isinstance(found, HeliosError):
            found.hint = "The Hub serves files over 50 GB through Xet alone, which is not supported yet."
        raise found

    def _check_head(self, response: Response, span: Span, partly: bool) -> None:
        """Raise Transient unless the body is what was asked for."""
        length = response.headers.get("content-length")
        wanted = str(span.stop - span.start)
        if length not in (None, wanted) and (response.status == 206 or not partly):
            raise Transient(f"{self._where}: the upstream sends {length} bytes, {wanted} were expected")
        if not partly:
            return
        if response.status != 206:
            raise Transient(f"{self._where}: the upstream ignores ranges (status {response.status})")
        found = _CONTENT_RANGE.match(response.headers.get("content-range") or "")
        if found is None or int(found[1]) != span.start or found[2] not in ("*", str(self.file.size)):
            raise Transient(f"{self._where}: the upstream answered another range than was asked for")

    def _receive(self, response: Response, span: Span, buffer: memoryview) -> None:
        filled, since = 0, time.monotonic()
        try:
            while (room := min(len(buffer), span.stop - span.at)) and not self._stop.is_set():
                count = response.read_ready(buffer[filled:room])
                if not count:
                    return
                filled += count
                now = time.monotonic()
                if filled == room or now - since > FLUSH_S:
                    self._write(span, buffer[:filled], now)
                    filled, since = 0, now
                    response.extend(upstream.TIMEOUT_S)
        finally:
            if filled and not self._stop.is_set():
                self._write(span, buffer[:filled], time.monotonic())

    def _write(self, span: Span, data: memoryview, now: float) -> None:
        self._partial.write(data, span.at)
        with self._changed:
            numbers = list(self._blocks.advance(span, span.at + len(data)))
            self._retry.progress()
            before = self._width.now_open
            self._width.arrived(len(data), now)
            if self._width.now_open > before:
                self._staff()
            if numbers or now - self._waked > FLUSH_S:
                self._notify()
        self._partial.done(numbers)

    def _notify(self) -> None:
        """Wake everybody. With the lock held."""
        self._waked = time.monotonic()
        self._changed.notify_all()
        for wake in self._wakes.values():
            wake()

    def _unwanted(self) -> None:
        self._wanted -= 1
        self._idle_since = time.monotonic()


class Reader:
    """One reader's view of a flight. Used on the event loop."""

    def __init__(self, flight: Flight, number: int) -> None:
        self._flight, self._number = flight, number
        self._attempt: int | None = None
        self._file: BinaryIO | None = None

    def ready(self, offset: int, begun: bool) -> tuple[BinaryIO, int] | None:
        """A file, and up to where its bytes from ``offset`` on may be sent; None when none may yet.

        ``begun``: some were sent already, so that what comes must be of the same attempt. Raises what the flight fails
        with.
        """
        flight = self._flight
        with flight._changed:
            if flight.error is not None:
                raise again(flight.error)
            blocks = flight._blocks
            blocks.want(self._number, offset)
            if not flight._opened or (end := blocks.ready(offset)) <= offset:
                return None
            if flight.attempt != self._attempt:
                if begun:
                    raise IntegrityError(f"{flight.file.path}: the upstream sent wrong bytes; ask again")
                self.close()
                self._file = os.fdopen(flight._partial.duplicate(), "rb", buffering=0)
                self._attempt = flight.attempt
            assert self._file is not None
            return self._file, end

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class FlightSource:
    """The flight's bytes in order, as an ingest's source."""

    def __init__(self, flight: Flight) -> None:
        self._flight, self._offset = flight, 0

    def readinto(self, buffer: memoryview, /) -> int:
        count = self._flight.read_into(buffer, self._offset)
        self._offset += count
        return count


def again(error: HeliosError) -> HeliosError:
    """The error for one more person: an exception raised in several threads would collect their tracebacks."""
    copy = type(error)(error.message, hint=error.hint, code=error.code)
    copy.__dict__.update({k: v for k, v in vars(error).items() if not k.startswith("__")})
    return copy.with_traceback(None)
