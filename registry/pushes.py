"""Pushes under way: a directory that is being published, file by file, until its commit makes it visible.

A push is kept in memory only: a registry that ends forgets it, and the next start removes what it had stored. Nothing
else is needed, because a client repeats the whole push and finds most of its bytes stored already.

All state here is touched on the event loop only; what blocks runs in threads. ``Push.busy`` counts the calls inside a
push, so that it is neither expired nor committed under one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from helios.errors import Conflict, DeadlineExceeded, HeliosError, InvalidInput, NotFound, RepoNotFound, Unavailable
from helios.names import RepoId, check_ref
from heliosfs.store.bulk import check_bulk
from heliosfs.store.manifest import FileEntry, check_tree
from registry.body import BodySource
from registry.catalog import Catalog
from registry.ingest import IngestedBlob, Source
from registry.ingest.reader import FileSource
from registry.sessions import Session, Sessions

log = logging.getLogger("helios.registry.pushes")

IDLE_S: Final = 3600.0
"""A push without a call for this long is dropped, in seconds."""

INGESTS: Final = 4
"""Most files ingested at a time; others wait, without their bytes being read from the network."""

CALM_S: Final = 150.0
"""Longest wait for interrupted ingests to end, in seconds; they end at their next read."""

MAX_PUSHES: Final = 256
"""Most pushes under way: each keeps its list of files in memory."""


class Stoppable(Protocol):
    """What an ingest reads from and the event loop can stop. ``taken`` counts the bytes read so far."""

    taken: int

    def fail(self, error: HeliosError) -> None: ...


class LocalSource:
    """A local file as a source that can be stopped from another thread."""

    def __init__(self) -> None:
        self.file: FileSource | None = None
        self.taken = 0
        self._error: HeliosError | None = None

    def fail(self, error: HeliosError) -> None:
        self._error = error

    def readinto(self, buffer: memoryview, /) -> int:
        if self._error is not None:
            raise self._error
        assert self.file is not None
        count = self.file.readinto(buffer)
        self.taken += count
        return count


@dataclass(frozen=True, slots=True)
class Announced:
    """A file that the client is going to send; ``size`` in bytes."""

    path: str
    size: int
    executable: bool


@dataclass(slots=True)
class Push:
    """One push. ``base`` is where the ref pointed at its start: the commit is a compare-and-swap from there."""

    id: str
    repo: RepoId
    ref: str
    message: str
    author: str
    base: str | None
    files: dict[str, Announced]
    session: Session
    used: float
    stored: dict[str, IngestedBlob] = field(default_factory=dict)
    sources: set[Stoppable] = field(default_factory=set)
    busy: int = 0
    calm: asyncio.Event = field(default_factory=asyncio.Event)
    closing: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """How far a push is: files stored, and bytes read including those of files under way."""

    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a commit answers."""

    commit: str
    manifest: str
    logical_bytes: int
    new_bytes: int
    deduplicated_bytes: int
    unchanged: bool


class Pushes:
    """The pushes of one registry."""

    def __init__(
        self,
        catalog: Catalog,
        sessions: Sessions,
        *,
        idle_s: float = IDLE_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog, self._sessions = catalog, sessions
        self._idle_s, self._now = idle_s, now
        self._pushes: dict[str, Push] = {}
        self._threads = ThreadPoolExecutor(INGESTS, thread_name_prefix="ingest")
        self._slots = asyncio.Semaphore(INGESTS)
        self._closed = False

    def __len__(self) -> int:
        return len(self._pushes)

    async def start(self, repo: RepoId, ref: str, message: str, author: str, files: list[Announced]) -> str:
        """Check what a client wants to publish and return the push's id. Raises InvalidInput naming what is wrong."""
        check_ref(ref)
        if not files:
            raise InvalidInput(f"{repo.id}: there is nothing to publish, no file at all")
        by_path = {file.path: file for file in files}
        if len(by_path) != len(files):
            raise InvalidInput(f"{repo.id}: a path is listed twice")
        check_bulk(by_path)
        check_tree(by_path)
        self._catalog.admission.check_names(repo, by_path)
        self._check_open()
        base = await asyncio.to_thread(self._base, repo, ref)
        session = await asyncio.to_thread(self._sessions.open)
        try:
            self._check_open()
        except Unavailable:
            await asyncio.to_thread(session.close)
            raise
        push = Push(secrets.token_hex(16), repo, ref, message, author, base, by_path, session, self._now())
        self._pushes[push.id] = push
        return push.id

    async def put_body(self, id_: str, path: str, body: AsyncIterator[bytes]) -> IngestedBlob:
        """Store one of the push's files from a request's body, streamed with bounded memory."""
        with self._using(id_) as push:
            announced = _announced(push, path)
            async with self._slots:
                source = BodySource(announced.size, path)
                async with self._running(push, source, self._ingest, push, announced, source) as work:
                    feeder = asyncio.ensure_future(_feed(source, body))
                    try:
                        both: list[asyncio.Future[Any]] = [work, feeder]
                        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                        if feeder.done():
                            feeder.result()
                        push.stored[path] = await work
                        return push.stored[path]
                    finally:
                        source.abandon()  # an ingest that failed takes no more; the rest of the body is not read
                        feeder.cancel()
                        await asyncio.wait([feeder])

    async def put_local(self, id_: str, path: str, local: str, gone: Awaitable[None]) -> IngestedBlob:
        """Store one of the push's files from a file of this machine. The caller must be the registry's own user.

        ``gone`` ends when the caller has left; the file is then read no further.
        """
        with self._using(id_) as push:
            announced = _announced(push, path)
            async with self._slots:
                source = LocalSource()
                left = asyncio.ensure_future(gone)
                try:
                    async with self._running(push, source, self._ingest_local, push, announced, local, source) as work:
                        both: list[asyncio.Future[Any]] = [work, left]
                        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                        if not work.done():
                            source.fail(Unavailable(f"{path}: the sender went away"))
                        push.stored[path] = await work
                        return push.stored[path]
                finally:
                    left.cancel()

    @contextlib.asynccontextmanager
    async def _running(
        self, push: Push, source: Stoppable, call: Callable[..., IngestedBlob], *args: object
    ) -> AsyncIterator[asyncio.Future[IngestedBlob]]:
        """An ingest in a thread, which has ended when the context is left, whatever the reason."""
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, partial(call, *args))
        push.sources.add(source)
        try:
            yield work
        finally:
            push.sources.discard(source)
            if not work.done():  # the client left, or we are shutting down
                source.fail(Unavailable(f"{push.repo.id}: the push was interrupted"))
                await asyncio.wait([work])  # bounded: a source and the store's buffers have deadlines of their own
            if not work.cancelled():
                work.exception()  # it has been raised, or an earlier error has

    def state(self, id_: str) -> State:
        """How far a push is."""
        push = self._find(id_)
        done = sum(blob.entry.size for blob in push.stored.values())
        return State(len(push.stored), done + sum(source.taken for source in push.sources))

    async def commit(self, id_: str) -> Outcome:
        """Make the push visible. Raises InvalidInput when a file is missing, Conflict when the ref has moved."""
        with self._using(id_) as push:
            if push.busy > 1:
                raise Conflict("a file of this push is still being stored; wait for it, then commit")
            if missing := push.files.keys() - push.stored.keys():
                raise InvalidInput(f"{len(missing)} files were not sent yet, for example {min(missing)!r}")
            push.closing = True
            try:
                outcome = await asyncio.to_thread(self._commit, push)
            except BaseException:
                push.closing = False
                raise
            self._pushes.pop(id_, None)
        await asyncio.to_thread(push.session.close)
        return outcome

    async def abort(self, id_: str) -> None:
        """Give a push up; files being stored are interrupted, and what nobody else uses is removed soon."""
        with self._using(id_) as push:
            push.closing = True
            for source in list(push.sources):
                source.fail(Unavailable(f"{push.repo.id}: the push was given up"))
            try:
                await asyncio.wait_for(push.calm.wait(), CALM_S)
            except TimeoutError:
                push.closing = False
                raise DeadlineExceeded(f"the files of this push did not end within {CALM_S:.0f} s") from None
            self._pushes.pop(id_, None)
        await asyncio.to_thread(push.session.close)

    async def keep_clean(self, interval_s: float = 1.0) -> None:
        """Drop idle pushes and clean up after failed ones, until cancelled. Run by the daemon as a task of its own."""
        while True:
            idle = [p for p in self._pushes.values() if not p.busy and self._now() - p.used > self._idle_s]
            for push in idle:  # taken out together: nobody can come back to one while another is closed
                log.warning("dropped an idle push", extra={"repo": str(push.repo), "push": push.id})
                del self._pushes[push.id]
            for push in idle:
                await asyncio.to_thread(push.session.close)
            if self._sessions.work.is_set():
                try:
                    count = await asyncio.to_thread(self._sessions.clean, 30.0)
                except HeliosError as error:
                    log.warning("cleaning up failed; it will be tried again", extra={"error": str(error)})
                    await asyncio.sleep(30)
                else:
                    log.info("cleaned up after a push that came to nothing", extra={"objects": count})
            await asyncio.sleep(interval_s)

    def interrupt(self) -> None:
        """Take no new push and end the files under way, at the start of a shutdown."""
        self._closed = True
        for push in self._pushes.values():
            for source in push.sources:
                source.fail(Unavailable("the registry is stopping; push again when it is back"))

    async def aclose(self) -> None:
        """Give up what is left, at shutdown; calls inside a push have ended or been cancelled by then."""
        self._closed = True
        left, self._pushes = list(self._pushes.values()), {}
        for push in left:
            await asyncio.to_thread(push.session.close)
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._sessions.clean, 5.0)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the registry is stopping; push again when it is back")
        if len(self._pushes) >= MAX_PUSHES:
            raise Unavailable(f"{MAX_PUSHES} pushes are under way; try again later")

    def _find(self, id_: str) -> Push:
        push = self._pushes.get(id_)
        if push is None or push.closing:
            raise NotFound(
                f"there is no push {id_[:64]!r}", hint="It was committed, given up or dropped; start the push again."
            )
        return push

    @contextlib.contextmanager
    def _using(self, id_: str) -> Iterator[Push]:
        push = self._find(id_)
        push.busy += 1
        push.used = self._now()
        if push.busy > 1:
            push.calm.clear()
        else:
            push.calm.set()
        try:
            yield push
        finally:
            push.busy -= 1
            push.used = self._now()
            if push.busy <= 1:
                push.calm.set()

    def _base(self, repo: RepoId, ref: str) -> str | None:
        try:
            return self._catalog.refs(repo).get(ref)
        except RepoNotFound:
            return None

    def _ingest(self, push: Push, file: Announced, source: Source) -> IngestedBlob:
        return push.session.ingest(file.path, file.size, source, executable=file.executable)

    def _ingest_local(self, push: Push, file: Announced, local: str, source: LocalSource) -> IngestedBlob:
        if not os.path.isabs(local) or "\0" in local:
            raise InvalidInput(f"local={local!r} is not an absolute path")
        with FileSource(Path(local)) as source.file:
            if source.file.size != file.size:
                raise InvalidInput(f"{file.path}: it has {source.file.size} bytes, {file.size} were announced")
            before = _stamp(local)
            blob = self._ingest(push, file, source)
            if _stamp(local) != before:
                raise InvalidInput(f"{file.path}: changed while it was published; publish again when nobody writes it")
            return blob

    def _commit(self, push: Push) -> Outcome:
        files: dict[str, FileEntry] = {path: blob.entry for path, blob in push.stored.items()}
        published = self._catalog.publish(
            push.repo, push.ref, files, author=push.author, message=push.message, parent=push.base, expect=push.base
        )
        stored = push.stored.values()
        return Outcome(
            commit=published.record.commit,
            manifest=published.record.manifest,
            logical_bytes=sum(blob.entry.size for blob in stored),
            new_bytes=sum(blob.new_bytes for blob in stored),
            deduplicated_bytes=sum(blob.deduplicated_bytes for blob in stored),
            unchanged=not published.moved,
        )


def _announced(push: Push, path: str) -> Announced:
    announced = push.files.get(path)
    if announced is None:
        raise InvalidInput(f"the push does not list the path {path[:200]!r}")
    return announced


async def _feed(source: BodySource, body: AsyncIterator[bytes]) -> None:
    """Hand a body to an ingest. What is wrong with the body comes out of the ingest; a sender that left raises here."""
    try:
        async for data in body:
            await source.write(data)
        source.finish()
    except HeliosError as error:
        source.fail(error)


def _stamp(local: str) -> tuple[int, int, int]:
    """What differs after a file was written or replaced."""
    try:
        status = os.stat(local)
    except OSError as error:
        raise InvalidInput(f"{local}: can't be read: {error.strerror}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns
