"""Pushes under way: a directory that is being published, file by file, until its commit makes it visible.

A push is in SQL, so any process that shares the registry's metadata can go on with it: take its files, tell how far it
is, commit it or give it up. Only the files being stored here and now are this process' own. Where one process uses the
database, a push ends with it: a client repeats the whole push and finds most of its bytes stored already.

What is in memory is touched on the event loop only; what blocks runs in threads. ``Active.busy`` counts the calls
inside a push here, so that it is neither dropped as idle nor committed under one; one that is committed or given up by
another process ends them, at the latest when they want to say that their file is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from helios.errors import Conflict, DeadlineExceeded, HeliosError, InvalidInput, Unavailable
from helios.names import RepoId, check_ref
from heliosfs.store.batch import Chunk
from heliosfs.store.bulk import check_bulk
from heliosfs.store.manifest import check_tree
from registry.access import Lister
from registry.catalog import Catalog
from registry.ingest import IngestedBlob, Source
from registry.ingest.types import SenderGone
from registry.metadata.pushes import PushRow
from registry.offers import Lacking, Offers
from registry.push_log import IDLE_S, Announced, Outcome, PushLog, StoredFile, no_push
from registry.push_sources import ingest_local
from registry.receiver import Receiver, Stoppable
from registry.sessions import Session, Sessions
from registry.threads import Threads

log = logging.getLogger("helios.registry.pushes")

RETRY_S: Final = 30.0
"""How long after a cleaning that failed the next one comes, in seconds."""

CALM_S: Final = 150.0
"""Longest wait for interrupted ingests to end, in seconds; they end at their next read."""


@dataclass(slots=True)
class Turn:
    """The calls for one file, one of which is at work; ``sources`` are what that reads."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    sources: set[Stoppable] = field(default_factory=set)
    calls: int = 0


@dataclass(slots=True)
class Active:
    """The calls of one push that run in this process. ``push`` is what does not change while it is under way."""

    push: PushRow
    repo: RepoId
    session: Session
    turns: dict[str, Turn] = field(default_factory=dict)
    busy: int = 0
    calm: asyncio.Event = field(default_factory=asyncio.Event)
    closing: bool = False

    @contextlib.asynccontextmanager
    async def file(self, path: str) -> AsyncIterator[set[Stoppable]]:
        """The turn of one file. An earlier call for it is ended first: its client has given that up."""
        turn = self.turns.setdefault(path, Turn())
        turn.calls += 1
        try:
            for source in turn.sources:
                source.fail(SenderGone(f"{path}: it is sent again"))
            async with turn.lock:
                if self.closing:
                    raise no_push(self.push.id)
                yield turn.sources
        finally:
            turn.calls -= 1
            if not turn.calls:
                del self.turns[path]

    @property
    def sources(self) -> list[Stoppable]:
        """All that is being read for this push."""
        return [source for turn in self.turns.values() for source in turn.sources]


@dataclass(frozen=True, slots=True)
class State:
    """How far a push is: files stored, and bytes read including those of files under way."""

    files: int
    bytes: int


class Pushes:
    """The pushes of one registry, as one of its processes sees them."""

    def __init__(
        self,
        catalog: Catalog,
        sessions: Sessions,
        *,
        idle_s: float = IDLE_S,
        now: Callable[[], float] | None = None,
    ) -> None:
        """``now`` stands for the database's clock, in seconds."""
        self._catalog, self._sessions = catalog, sessions
        self._log = PushLog(catalog, sessions, idle_s=idle_s, now=now)
        self._active: dict[str, Active] = {}
        self._offers = Offers(catalog, self._log)
        self._receiver = Receiver()
        self._closed = False

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
        id_ = await asyncio.to_thread(self._log.start, repo, ref, message, author, files)
        if self._closed:
            await asyncio.to_thread(self._log.end, [id_])
        self._check_open()
        return id_

    async def put_body(self, id_: str, path: str, body: AsyncIterator[bytes]) -> StoredFile:
        """Store one of the push's files from a request's body, streamed with bounded memory.

        If the sender leaves, chunks that have come are kept for when the file is offered again.
        """
        async with self._using(id_) as active, active.file(path) as sources:
            file = await asyncio.to_thread(self._log.announced, id_, path)
            ingest = partial(self._ingest, active, file)
            blob = await self._receiver.receive(file.size, path, body, ingest, sources)
            return await asyncio.to_thread(self._log.store, id_, path, blob.entry, blob.new_bytes)

    def _ingest(self, active: Active, file: Announced, source: Source) -> IngestedBlob:
        try:
            return active.session.ingest(file.path, file.size, source, executable=file.executable, rescue=True)
        except SenderGone as gone:
            if gone.kept:
                self._log.add_new(active.push.id, file.path, gone.kept)
            raise

    async def put_local(self, id_: str, path: str, local: str, gone: Callable[[], Awaitable[None]]) -> StoredFile:
        """Store one of the push's files from a file of this machine. The caller must be the registry's own user.

        What ``gone`` gives ends when the caller has left; the file is then read no further.
        """
        async with self._using(id_) as active, active.file(path) as sources:
            file = await asyncio.to_thread(self._log.announced, id_, path)
            ingest = partial(ingest_local, active.session, file, local)
            blob = await self._receiver.read(path, ingest, gone, sources)
            return await asyncio.to_thread(self._log.store, id_, path, blob.entry, blob.new_bytes)

    async def offer(
        self, id_: str, path: str, record: bytes, sight: Lister, gone: Callable[[], Awaitable[None]]
    ) -> StoredFile | Lacking:
        """Store one of the push's files by its recipe, from what is here; or say what else it takes."""
        async with self._using(id_) as active, active.file(path) as sources:
            file = await asyncio.to_thread(self._log.announced, id_, path)
            session = active.session
            look = self._offers.look  # short, so it waits for nobody's ingest
            found = await asyncio.to_thread(look, id_, active.repo, session, file, record, sight)
            if found.lacking is not None:
                return found.lacking
            entry, new_bytes = found.entry, 0
            if entry is None:
                compose = partial(self._offers.compose, session, file, found)
                blob = await self._receiver.read(path, compose, gone, sources)
                entry, new_bytes = blob.entry, blob.new_bytes
            return await asyncio.to_thread(self._log.store, id_, path, entry, new_bytes)

    async def known(self, id_: str, path: str, chunks: list[Chunk], sight: Lister) -> int:
        """How many of some chunks of one of the push's files are here."""
        async with self._using(id_) as active:
            await asyncio.to_thread(self._log.announced, id_, path)
            return await asyncio.to_thread(self._offers.known, id_, active.session, chunks, sight)

    async def put_chunks(
        self, id_: str, path: str, chunks: list[Chunk], body: AsyncIterator[bytes], sight: Lister
    ) -> int:
        """Store chunks of one of the push's files, which a recipe will name; returns how many bytes were new."""
        async with self._using(id_) as active, active.file(path) as sources:
            await asyncio.to_thread(self._log.announced, id_, path)
            store = partial(active.session.store_chunks, path, chunks, noted=not sight.all)
            size = sum(length for _, length in chunks)
            new_bytes = await self._receiver.receive(size, path, body, store, sources)
            await asyncio.to_thread(self._log.add_new, id_, path, new_bytes)
            return new_bytes

    async def state(self, id_: str) -> State:
        """How far a push is; of files under way, those that are stored by this process count."""
        files, done = await asyncio.to_thread(self._log.progress, id_)
        active = self._active.get(id_)
        return State(files, done + sum(source.taken for source in active.sources) if active else done)

    async def commit(self, id_: str) -> Outcome:
        """Make the push visible. Raises InvalidInput when a file is missing, Conflict when the ref has moved."""
        async with self._using(id_) as active:
            if active.busy > 1:
                raise Conflict("a file of this push is still being stored; wait for it, then commit")
            active.closing = True
            try:
                return await self._receiver.publish(partial(self._log.commit, active.push))
            finally:
                active.closing = False  # where it came about, the push is not found any more

    async def abort(self, id_: str) -> None:
        """Give a push up; files being stored are interrupted, and what nobody else uses is removed soon."""
        async with self._using(id_) as active:
            active.closing = True
            try:
                for source in active.sources:
                    source.fail(Unavailable(f"{active.repo.id}: the push was given up"))
                async with asyncio.timeout(CALM_S):
                    await active.calm.wait()
                await asyncio.to_thread(self._log.end, [id_])
            except TimeoutError:
                raise DeadlineExceeded(f"the files of this push did not end within {CALM_S:.0f} s") from None
            finally:
                active.closing = False

    async def keep_clean(self, upkeep: Threads, interval_s: float = 1.0) -> None:
        """Drop idle pushes and clean up after failed ones, until cancelled. Run by the daemon as a task of its own."""
        while True:
            try:
                await self._keep_clean(upkeep)
            except HeliosError as error:
                log.warning("cleaning up failed; it will be tried again", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(interval_s)

    async def _keep_clean(self, upkeep: Threads) -> None:
        ended = set(self._active) - await upkeep(self._log.look_after, list(self._active))
        for id_ in ended & self._active.keys():
            for source in self._active[id_].sources:
                source.fail(Unavailable("the push was committed or given up elsewhere"))
        if self._catalog.database.kind.shared:
            await upkeep(self._sessions.recover)
        if self._sessions.work.is_set():
            count = await upkeep(self._sessions.clean)
            log.info("cleaned up after a push that came to nothing", extra={"objects": count})

    def interrupt(self) -> None:
        """Take no new push and end the files under way, at the start of a shutdown."""
        self._closed = True
        self._receiver.interrupt()

    async def aclose(self) -> None:
        """End this process' part, at shutdown; calls inside a push have ended or been cancelled by then.

        Where other processes share the database they go on with the pushes; else these are given up.
        """
        self._closed = True
        if not self._catalog.database.kind.shared:
            await asyncio.to_thread(self._log.end, None)
        await self._receiver.aclose()
        await asyncio.to_thread(self._sessions.clean)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the registry is stopping; push again when it is back")

    @contextlib.asynccontextmanager
    async def _using(self, id_: str) -> AsyncIterator[Active]:
        active = self._active.get(id_)
        if active is None:
            push = await asyncio.to_thread(self._log.find, id_)
            repo = RepoId.from_canonical(push.repository)
            made = Active(push, repo, self._sessions.attach(push.session, repo))
            active = self._active.setdefault(id_, made)  # another call may have been faster
        if active.closing:
            raise no_push(id_)
        active.busy += 1
        self._settle(active)
        try:
            yield active
        finally:
            active.busy -= 1
            self._settle(active)
            if not active.busy:
                self._active.pop(id_, None)

    @staticmethod
    def _settle(active: Active) -> None:
        if active.busy > 1:
            active.calm.clear()
        else:
            active.calm.set()
