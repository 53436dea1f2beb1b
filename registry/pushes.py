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
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from helios.errors import Conflict, DeadlineExceeded, HeliosError, InvalidInput, Unavailable
from helios.names import RepoId, check_ref
from heliosfs.store.bulk import check_bulk
from heliosfs.store.manifest import check_tree
from registry.body import BodySource, feed
from registry.catalog import Catalog
from registry.ingest import IngestedBlob, Source
from registry.ingest.reader import FileSource
from registry.metadata.pushes import PushRow
from registry.push_log import IDLE_S, Announced, Outcome, PushLog, no_push
from registry.push_sources import LocalSource, Stoppable, stamp
from registry.sessions import Session, Sessions

log = logging.getLogger("helios.registry.pushes")

RETRY_S: Final = 30.0
"""How long after a cleaning that failed the next one comes, in seconds."""

INGESTS: Final = 4
"""Most files ingested at a time; others wait, without their bytes being read from the network."""

CALM_S: Final = 150.0
"""Longest wait for interrupted ingests to end, in seconds; they end at their next read."""


@dataclass(slots=True)
class Active:
    """The calls of one push that run in this process. ``push`` is what does not change while it is under way."""

    push: PushRow
    repo: RepoId
    session: Session
    sources: set[Stoppable] = field(default_factory=set)
    busy: int = 0
    calm: asyncio.Event = field(default_factory=asyncio.Event)
    closing: bool = False


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
        self._threads = ThreadPoolExecutor(INGESTS, thread_name_prefix="ingest")
        self._slots = asyncio.Semaphore(INGESTS)
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

    async def put_body(self, id_: str, path: str, body: AsyncIterator[bytes]) -> IngestedBlob:
        """Store one of the push's files from a request's body, streamed with bounded memory."""
        async with self._using(id_) as push:
            announced = await asyncio.to_thread(self._log.announced, push.push.id, path)
            async with self._slots:
                source = BodySource(announced.size, path)
                async with self._running(push, source, self._ingest, push, announced, source) as work:
                    feeder = asyncio.ensure_future(feed(source, body))
                    try:
                        both: list[asyncio.Future[Any]] = [work, feeder]
                        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                        if feeder.done():
                            feeder.result()
                        return await asyncio.to_thread(self._log.store, push.push.id, path, await work)
                    finally:
                        source.abandon()  # an ingest that failed takes no more; the rest of the body is not read
                        feeder.cancel()
                        await asyncio.wait([feeder])

    async def put_local(self, id_: str, path: str, local: str, gone: Awaitable[None]) -> IngestedBlob:
        """Store one of the push's files from a file of this machine. The caller must be the registry's own user.

        ``gone`` ends when the caller has left; the file is then read no further.
        """
        async with self._using(id_) as push:
            announced = await asyncio.to_thread(self._log.announced, push.push.id, path)
            async with self._slots:
                source = LocalSource()
                left = asyncio.ensure_future(gone)
                try:
                    async with self._running(push, source, self._ingest_local, push, announced, local, source) as work:
                        both: list[asyncio.Future[Any]] = [work, left]
                        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                        if not work.done():
                            source.fail(Unavailable(f"{path}: the sender went away"))
                        return await asyncio.to_thread(self._log.store, push.push.id, path, await work)
                finally:
                    left.cancel()

    @contextlib.asynccontextmanager
    async def _running(
        self, push: Active, source: Stoppable, call: Callable[..., IngestedBlob], *args: object
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
                return await asyncio.to_thread(self._log.commit, active.push)
            finally:
                active.closing = False  # where it came about, the push is not found any more

    async def abort(self, id_: str) -> None:
        """Give a push up; files being stored are interrupted, and what nobody else uses is removed soon."""
        async with self._using(id_) as active:
            active.closing = True
            try:
                for source in list(active.sources):
                    source.fail(Unavailable(f"{active.repo.id}: the push was given up"))
                await asyncio.wait_for(active.calm.wait(), CALM_S)
                await asyncio.to_thread(self._log.end, [id_])
            except TimeoutError:
                raise DeadlineExceeded(f"the files of this push did not end within {CALM_S:.0f} s") from None
            finally:
                active.closing = False

    async def keep_clean(self, interval_s: float = 1.0) -> None:
        """Drop idle pushes and clean up after failed ones, until cancelled. Run by the daemon as a task of its own."""
        while True:
            try:
                await self._keep_clean()
            except HeliosError as error:
                log.warning("cleaning up failed; it will be tried again", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(interval_s)

    async def _keep_clean(self) -> None:
        ended = set(self._active) - await asyncio.to_thread(self._log.look_after, list(self._active))
        for id_ in ended & self._active.keys():
            for source in self._active[id_].sources:
                source.fail(Unavailable("the push was committed or given up elsewhere"))
        if self._catalog.database.kind.shared:
            await asyncio.to_thread(self._sessions.recover)
        if self._sessions.work.is_set():
            count = await asyncio.to_thread(self._sessions.clean)
            log.info("cleaned up after a push that came to nothing", extra={"objects": count})

    def interrupt(self) -> None:
        """Take no new push and end the files under way, at the start of a shutdown."""
        self._closed = True
        for active in self._active.values():
            for source in active.sources:
                source.fail(Unavailable("the registry is stopping; push again when it is back"))

    async def aclose(self) -> None:
        """End this process' part, at shutdown; calls inside a push have ended or been cancelled by then.

        Where other processes share the database they go on with the pushes; else these are given up.
        """
        self._closed = True
        if not self._catalog.database.kind.shared:
            await asyncio.to_thread(self._log.end, None)
        await asyncio.to_thread(self._threads.shutdown)
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
            made = Active(push, repo, self._sessions.attach(push.session))
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

    def _ingest(self, push: Active, file: Announced, source: Source) -> IngestedBlob:
        return push.session.ingest(file.path, file.size, source, executable=file.executable)

    def _ingest_local(self, push: Active, file: Announced, local: str, source: LocalSource) -> IngestedBlob:
        if not os.path.isabs(local) or "\0" in local:
            raise InvalidInput(f"local={local!r} is not an absolute path")
        with FileSource(Path(local)) as source.file:
            if source.file.size != file.size:
                raise InvalidInput(f"{file.path}: it has {source.file.size} bytes, {file.size} were announced")
            before = stamp(local)
            blob = self._ingest(push, file, source)
            if stamp(local) != before:
                raise InvalidInput(f"{file.path}: changed while it was published; publish again when nobody writes it")
            return blob
