"""One snapshot brought from the upstream: compare with what is held, download what is missing, ingest, publish.

Works in the caller's thread and a few more for the files. Nothing is visible before the last step, and what is done
stays for the next attempt (``spool``).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from helios.errors import IntegrityError, InvalidInput, NoSpace, RepoNotFound
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.catalog import Catalog
from registry.ingest.reader import FileSource
from registry.pull.listing import RemoteFile, Snapshot, choose
from registry.pull.progress import Progress
from registry.pull.spool import Partial, RepoSpool, Spool
from registry.pull.upstream import Stopped, Upstream
from registry.sessions import Session, Sessions

log = logging.getLogger("helios.registry.pull")

SLACK: Final = 64 << 20
"""Bytes that stay free on a disk a pull writes to."""
INGESTS: Final = 2
"""Most files ingested at a time by all pulls: each keeps two cores busy, and pushes want their share."""
TRIES: Final = 2
"""Times a file is downloaded whole when its bytes turn out wrong."""


class Turns:
    """One holder at a time for each name: two pulls that want the same content download it once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: set[str] = set()

    @contextmanager
    def turn(self, name: str, stop: threading.Event) -> Iterator[None]:
        """Waits as long as the holder works, which has deadlines of its own; raises Stopped when ``stop`` is set."""
        with self._changed:
            while name in self._held:
                self._changed.wait(0.2)
                if stop.is_set():
                    raise Stopped
            self._held.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(name)
                self._changed.notify_all()


class StoppableSource:
    """A downloaded file as an ingest's source, which ends when the pull is stopped."""

    def __init__(self, file: FileSource, stop: threading.Event) -> None:
        self._file, self._stop = file, stop

    def readinto(self, buffer: memoryview, /) -> int:
        if self._stop.is_set():
            raise Stopped
        return self._file.readinto(buffer)


@dataclass
class Work:
    """One snapshot being brought in."""

    snapshot: Snapshot
    progress: Progress
    stop: threading.Event
    session: Session
    spool: RepoSpool
    entries: dict[str, FileEntry] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def done(self, file: RemoteFile, entry: FileEntry) -> None:
        """The file is stored. The manifest shows it as the upstream does, whatever another repository calls it."""
        if entry.size != file.size:
            raise IntegrityError(
                f"{file.path}: the upstream lists {file.size} bytes, but sha256 {entry.sha256} has {entry.size}"
            )
        mine = FileEntry(entry.sha256, entry.size, file.git_oid, entry.recipe, file.lfs, executable=False)
        with self.lock:
            self.entries[file.path] = mine
        self.progress.done(file.path, file.size)


class Puller:
    """Brings snapshots in. Threads may share it."""

    def __init__(
        self,
        catalog: Catalog,
        sessions: Sessions,
        spool: Spool,
        upstream: Upstream,
        *,
        files: int,
        free_bytes: Callable[[], dict[str, int]],
    ) -> None:
        """``files`` are downloaded at a time; ``free_bytes`` tells the bytes free on ``spool`` and ``store``; one key,
        ``both``, when they share a disk."""
        self._catalog, self._sessions, self._spool, self._upstream = catalog, sessions, spool, upstream
        self._files, self._free_bytes = files, free_bytes
        self._turns = Turns()
        self._ingesting = threading.BoundedSemaphore(INGESTS)

    def bring(self, snapshot: Snapshot, ref: str | None, progress: Progress, stop: threading.Event) -> None:
        """Publish the snapshot under the upstream's commit id, and under ``ref`` where one is given."""
        repo = snapshot.repo
        wanted, skipped = choose(snapshot.files)
        for path, instead in skipped.items():
            progress.log(f"left out {path}: pickle, and {instead} holds the same")
            log.info("left out a pickle file", extra={"repo": str(repo), "file": path, "instead": instead})
        with self._sessions.open() as session:
            work = Work(snapshot, progress, stop, session, self._spool.open(repo))
            for file in wanted:
                progress.file(file.path, file.size)
            missing = self._reuse(work, wanted)
            progress.log(
                f"{len(wanted)} files, {len(missing)} to download: {sum(f.size for f in missing)} of "
                f"{sum(f.size for f in wanted)} bytes"
            )
            self._check_space(work, missing)
            self._fetch_all(work, missing)
            files = {file.path: work.entries[file.path] for file in wanted}
            self._catalog.publish(
                repo,
                ref,
                files,
                commit=snapshot.commit,
                author=snapshot.author,
                message=f"Pulled from {self._upstream.endpoint}",
                time=snapshot.time,
                lineage=snapshot.lineage,
            )

    def _reuse(self, work: Work, files: list[RemoteFile]) -> list[RemoteFile]:
        """Take what is held already; returns the rest."""
        known = self._regular_files(work.snapshot.repo)
        missing = []
        for file in files:
            sha256 = file.sha256 or known.get(file.git_oid)
            entry = None if sha256 is None else work.session.reuse(sha256)
            if entry is None:
                missing.append(file)
            else:
                work.done(file, entry)
        return missing

    def _regular_files(self, repo: RepoId) -> dict[str, str]:
        """Git oid -> sha256 of the repository's own regular files: a sha1 is not believed across repositories."""
        try:
            commits = set(self._catalog.refs(repo).values())
        except RepoNotFound:
            return {}
        entries = [entry for commit in commits for entry in self._catalog.manifest(repo, commit).files.values()]
        return {entry.git_oid: entry.sha256 for entry in entries if not entry.lfs}

    def _check_space(self, work: Work, missing: list[RemoteFile]) -> None:
        """Raise NoSpace when what is missing will not fit, before anything is downloaded.

        A large file lies in the spool only until it is ingested, a regular (small) one until the end.
        """
        here = {file.key: min(work.spool.partial(file).size, file.size) for file in missing}
        large = sorted((file.size for file in missing if file.lfs), reverse=True)
        small = sum(file.size for file in missing if not file.lfs)
        need = {"store": sum(file.size for file in missing)}
        need["spool"] = max(0, sum(large[: self._files]) + small - sum(here.values()))
        need["both"] = need["store"] + need["spool"]
        for disk, free in self._free_bytes().items():
            if missing and need[disk] + SLACK > free:
                where = {"store": "the object store", "spool": "downloads", "both": "the object store and downloads"}
                raise NoSpace(
                    f"{work.snapshot.repo.id}@{work.snapshot.commit[:8]} needs {need[disk] + SLACK} bytes for "
                    f"{where[disk]}, but only {free} are free",
                    hint="Free some space, or put the store elsewhere (registry.store), then pull again.",
                )

    def _fetch_all(self, work: Work, missing: list[RemoteFile]) -> None:
        """Download and ingest files, a few at a time, the largest first; the first failure stops the others."""
        queue = deque(sorted(missing, key=lambda file: (-file.size, file.path)))
        problems: list[BaseException] = []

        def run() -> None:
            while not work.stop.is_set():
                try:
                    file = queue.popleft()
                except IndexError:
                    return
                try:
                    self._fetch(work, file)
                except BaseException as error:  # raised again by the pull's own thread
                    with work.lock:
                        problems.append(error)
                    work.stop.set()

        threads = [
            threading.Thread(target=run, name=f"pull-{number}", daemon=True)
            for number in range(min(self._files, len(missing)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]
        if work.stop.is_set():
            raise Stopped

    def _fetch(self, work: Work, file: RemoteFile) -> None:
        with self._turns.turn(file.key, work.stop):
            entry = None if file.sha256 is None else work.session.reuse(file.sha256)
            partial = work.spool.partial(file)
            if entry is None:
                entry = self._download(work, file, partial)
                work.spool.hold(entry.sha256)
            work.done(file, entry)
            if file.lfs:
                partial.remove()  # a regular file stays: a kill may lose its blob, which only its git oid names

    def _download(self, work: Work, file: RemoteFile, partial: Partial) -> FileEntry:
        """Download and ingest a file; wrong bytes are thrown away and asked for once more."""
        snapshot, path = work.snapshot, file.path
        for attempt in range(1, TRIES + 1):
            self._upstream.download(
                snapshot.repo, snapshot.commit, file, partial, lambda done: work.progress.done(path, done), work.stop
            )
            try:
                return self._ingest(work, file, partial)
            except (IntegrityError, InvalidInput) as error:
                if _is_as_listed(file, partial):
                    raise  # the upstream's own file is malformed, or our store has a problem
                partial.remove()
                work.progress.done(path, 0)
                log.warning(
                    "the upstream sent wrong bytes",
                    extra={"repo": str(snapshot.repo), "commit": snapshot.commit, "file": path, "attempt": attempt},
                )
                if attempt == TRIES:
                    raise IntegrityError(
                        f"{path} of {snapshot.repo.id}@{snapshot.commit}: the upstream's bytes are not those it lists "
                        f"({file.key}); downloaded {TRIES} times",
                        hint="Nothing was published. Try again later, or tell whoever runs the upstream.",
                    ) from error
                work.progress.log(f"{path}: wrong bytes came, downloading it again")
        raise AssertionError("unreachable")

    def _ingest(self, work: Work, file: RemoteFile, partial: Partial) -> FileEntry:
        while not self._ingesting.acquire(timeout=0.2):
            if work.stop.is_set():
                raise Stopped
        try:
            with FileSource(partial.path) as source:
                blob = work.session.ingest(
                    file.path,
                    file.size,
                    StoppableSource(source, work.stop),
                    lfs=file.lfs,
                    expect_sha256=file.sha256,
                    expect_git_oid=file.git_oid,
                )
        finally:
            self._ingesting.release()
        return blob.entry


def _is_as_listed(file: RemoteFile, partial: Partial) -> bool:
    """Whether the downloaded bytes have the hash that the upstream lists."""
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with partial.path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == (file.sha256 or file.git_oid)
