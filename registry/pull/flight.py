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
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from helios.errors import HeliosError, IntegrityError, InvalidInput
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.ingest import Source
from registry.pull.blocks import PIECE, Blocks, Span
from registry.pull.crew import Crew
from registry.pull.faults import again
from registry.pull.following import Ranges, follow
from registry.pull.listing import RemoteFile
from registry.pull.reading import FlightSource, Reader, View
from registry.pull.remote import FLUSH_S, Remote
from registry.pull.sharing import Lead
from registry.pull.spool import Partial
from registry.pull.turns import Rank, Turns
from registry.pull.upstream import Stopped, Token, Upstream

log = logging.getLogger("helios.registry.pull")

TRIES: Final = 2
"""Times a file is fetched whole when its bytes turn out wrong."""
NEAR_S: Final = 60.0
"""A large file is ingested from when the rest of it is expected within so many seconds."""
IDLE_S: Final = 30.0
"""A flight that need not finish ends when nobody has wanted it for so long, in seconds."""

RANKS: Final = 16
"""Who want a file, of whom it is remembered how much it matters to them."""

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
        connections: Turns,
        *,
        finish: bool,
        fetched: Callable[[int], object] = lambda count: None,
        lead: Lead | None = None,
    ) -> None:
        """``lead`` says which process brings the file, where there are several."""
        self.repo, self.commit, self.file = repo, commit, file
        self.entry: FileEntry | None = None
        self.error: HeliosError | None = None
        self.attempt = 1
        self.ended = threading.Event()
        """Its thread has let go of everything."""
        self._client, self._partial, self._finish = client, partial, finish
        self._ranks: list[Rank] = []
        self._remote = Remote(client, repo, commit, file)
        self._lead = lead
        self._told = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._crew = Crew(self, client, self._remote, connections, self._changed, self._stop, paused=lead is not None)
        self._blocks = Blocks(file.size)
        self._opened = False
        self._wakes: dict[int, Callable[[], None]] = {}
        self._wanted = 0
        self._idle_since = time.monotonic()
        self._waked = 0.0
        self._fetched = fetched
        self._came, self._came_since = 0, time.monotonic()
        self._closed = False

    @classmethod
    def landed(
        cls, client: Upstream, repo: RepoId, commit: str, file: RemoteFile, partial: Partial, entry: FileEntry
    ) -> Flight:
        """One for a file that the store has already."""
        flight = cls(client, repo, commit, file, partial, Turns(1), finish=True)
        flight.entry, flight._closed = entry, True
        return flight

    # --- for whoever wants the file ----------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether it has succeeded (``entry``) or failed (``error``)."""
        return self.entry is not None or self.error is not None

    @property
    def limited_s(self) -> float:
        """Seconds until the upstream's rate limit lets us ask for its bytes again."""
        return self._remote.limited_s

    def add_token(self, token: Token) -> None:
        """The bytes may be fetched with this token."""
        self._remote.add_token(token)

    def matters(self, rank: Rank) -> None:
        """Somebody wants it to whom it matters so much; of several the most counts."""
        with self._changed:
            self._ranks = [*self._ranks, rank][-RANKS:]

    @property
    def rank(self) -> int:
        """How much it matters, 0 the most."""
        return min((rank() for rank in self._ranks), default=0)

    @contextmanager
    def reading(self, offset: int, wake: Callable[[], None]) -> Iterator[Reader]:
        """A reader from ``offset`` on; ``wake`` is called from any thread when there may be something new.

        Raises Landed when the partial file has been let go.
        """
        number = next(_numbers)
        with self._changed:
            if self._closed or (self.entry is not None and self._stop.is_set() and not self._blocks.whole):
                raise Landed
            self._wanted += 1
            self._wakes[number] = wake
            self._blocks.want(number, offset)
            if self._opened:
                self._crew.staff()
        reader = Reader(self, number)
        try:
            yield reader
        finally:
            reader.close()
            with self._changed:
                del self._wakes[number]
                self._blocks.want(number, None)
                self._unwanted()
                self._changed.notify_all()

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
                    now = (max(self._blocks.here, self._told), self.attempt)
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

    def progress(self) -> tuple[int, int]:
        """For another process that waits: bytes that are here, and the attempt. It wants the file as a reader does."""
        with self._changed:
            self._idle_since = max(self._idle_since, time.monotonic())
            return self._blocks.here, self.attempt

    def outlook(self) -> tuple[int, float]:
        """Bytes that are here, and seconds until all are at the pace so far; infinite where nothing has come yet."""
        with self._changed:
            return max(self._blocks.here, self._told), self._left_s()

    def expect(self, seconds: float) -> None:
        """Somebody will ask again within so many seconds: until then it is not given up as unwanted."""
        with self._changed:
            self._idle_since = max(self._idle_since, time.monotonic() + seconds)

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
            entry = None if self._lead is None else follow(self, self._lead)
            if entry is None:
                entry = self._bring(ingest)
            stored(entry)
            self._serve_out(entry)
            self._end(entry, None)
            self._partial.unlink()
        except HeliosError as error:
            self._end(None, error)
        except Exception as error:
            log.exception("a download broke", extra={"repo": str(self.repo), "file": self.file.path})
            self._end(None, HeliosError(f"the download of {self.file.path} broke: {error!r}"))
        finally:
            self._crew.drain()

    def let_go(self) -> None:
        """After ``run``: close the partial file as soon as nobody reads it any more; waits until then.

        A file without a name goes with its last descriptor, and its pages with it: that takes 60 ms a GB, which are not
        to be spent on the event loop of its last reader.
        """
        with self._changed:
            while self._wakes:
                self._changed.wait(1.0)
            self._closed = True
        self._partial.close()

    # --- while another process brings it (following.py) --------------------------------------------------------------

    def follow(self, source: Ranges | None) -> None:
        """See ``Follower``."""
        if source is None:
            self._crew.drain(pausing=True)
        with self._changed:
            self._crew.fetch_from(source)

    def begin_again(self) -> None:
        """See ``Follower``."""
        self._crew.drain(pausing=True)
        with self._changed:
            self._forget()
            self._crew.go_on()

    def pause(self, seconds: float, here: int) -> None:
        """See ``Follower``."""
        with self._changed:
            if here != self._told:
                self._told = here
                self._notify()
            self._check()
            self._changed.wait(seconds)

    def _serve_out(self, entry: FileEntry) -> None:
        """The file is stored, but its bytes are not all here: readers get from the store what they want."""
        with self._changed:
            if self._blocks.whole:
                return
            self.entry, self._blocks.verified = entry, True
            self._notify()
            while self._wakes and not self._blocks.whole and not self._stop.is_set():
                self._crew.staff()
                self._changed.wait(0.2)

    # --- while we bring it -------------------------------------------------------------------------------------------

    def _bring(self, ingest: Ingest) -> FileEntry:
        for attempt in range(1, TRIES + 1):
            with self._changed:
                self._crew.staff()
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
                self._crew.drain()
                with self._changed:
                    self._partial.remove()  # readers have descriptors of their own
                    self._opened = False
                if attempt == TRIES:
                    raise IntegrityError(
                        f"{self.file.path} of {self.repo.id}@{self.commit}: the upstream's bytes are not those it "
                        f"lists ({self.file.key}); downloaded {TRIES} times",
                        hint="Nothing was published. Try again later, or tell whoever runs the upstream.",
                    ) from error
                self._remote.move()
                with self._changed:
                    self._forget()
        raise AssertionError("unreachable")

    def _forget(self) -> None:
        """Begin another attempt with nothing here. With the lock held, and nobody fetching."""
        self._partial.remove()  # readers have descriptors of their own
        self._partial.open()
        self._blocks = self._blocks.again(())
        self._opened, self.attempt = True, self.attempt + 1
        self._notify()

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
                if self._left_s() < NEAR_S:
                    return
                self._changed.wait(0.2)

    def _left_s(self) -> float:
        """Seconds until all bytes are here at the pace so far. With the lock held."""
        passed = max(time.monotonic() - self._came_since, 0.01)
        return (self.file.size - self._blocks.here) * passed / self._came if self._came else math.inf

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

    def _as_listed(self) -> bool:
        """Whether the downloaded bytes have the hash that the upstream lists."""
        digest, buffer, offset = self.file.hasher(), memoryview(bytearray(1 << 20)), 0
        while offset < self.file.size and (count := self._partial.read_into(buffer, offset)):
            digest.update(buffer[:count])
            offset += count
        return digest.hexdigest() == (self.file.sha256 or self.file.git_oid)

    # --- what workers need (crew.py) ---------------------------------------------------------------------------------

    @property
    def blocks(self) -> Blocks:
        """What is here, and what to ask for next. With the lock held."""
        return self._blocks

    @property
    def read(self) -> bool:
        """Whether anybody reads along. With the lock held."""
        return bool(self._wakes)

    def fail(self, error: HeliosError) -> None:
        """A worker has met what can't pass. With the lock held."""
        self.error = self.error or error

    def wake(self) -> None:
        """Something has changed. With the lock held."""
        self._notify()

    def write(self, span: Span, data: memoryview, now: float) -> None:
        """Bytes of a span have come."""
        self._partial.write(data, span.at)
        with self._changed:
            numbers = list(self._blocks.advance(span, span.at + len(data)))
            self._came += len(data)
            own = self._crew.arrived(len(data), now)
            if numbers or now - self._waked > FLUSH_S:
                self._notify()
        self._partial.done(numbers)
        if own:
            self._fetched(len(data))

    def _notify(self) -> None:
        """Wake everybody. With the lock held."""
        self._waked = time.monotonic()
        self._changed.notify_all()
        for wake in self._wakes.values():
            wake()

    def _unwanted(self) -> None:
        self._wanted -= 1
        self._idle_since = max(self._idle_since, time.monotonic())
