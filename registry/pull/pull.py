"""One snapshot brought from the upstream: compare with what is held, download what is missing, ingest, publish.

Works in the caller's thread and a few more for the files. Nothing is visible before the last step, and what is done
stays for the next attempt (``spool``).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy.engine import Connection

from helios.errors import IntegrityError, NoSpace
from heliosfs.store.manifest import FileEntry
from registry.catalog import Catalog
from registry.metadata.quotas import Amount
from registry.pull.flights import SLACK, Flights
from registry.pull.known import stored_regular
from registry.pull.listing import RemoteFile, Snapshot, choose
from registry.pull.progress import Progress
from registry.pull.spool import Spool
from registry.pull.upstream import Stopped, Token
from registry.quotas.quotas import COMMIT
from registry.sessions import Session, Sessions

log = logging.getLogger("helios.registry.pull")

SINGLE: Final = 1000
"""Files that are reserved one by one, so that those which others wait for, too, count once; the rest in one sum."""
REST: Final = "rest:"


@dataclass
class Work:
    """One snapshot being brought in."""

    snapshot: Snapshot
    progress: Progress
    stop: threading.Event
    session: Session
    token: Token
    ref: str | None
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
        self, catalog: Catalog, sessions: Sessions, spool: Spool, flights: Flights, endpoint: str, *, files: int
    ) -> None:
        """``files`` are downloaded at a time for one pull."""
        self._catalog, self._sessions, self._spool, self._flights = catalog, sessions, spool, flights
        self._endpoint, self._files = endpoint, files

    def bring(
        self,
        snapshot: Snapshot,
        ref: str | None,
        progress: Progress,
        stop: threading.Event,
        token: Token = None,
        kind: str = "branch",
        check: Callable[[Connection], None] = lambda _connection: None,
    ) -> None:
        """Publish the snapshot under the upstream's commit id, and under ``ref``, of that kind, where one is given.

        ``check`` runs with the publishing, in its transaction, and undoes it by raising.
        """
        repo = snapshot.repo
        wanted, skipped = choose(snapshot.files)
        for path, instead in skipped.items():
            progress.log(f"left out {path}: pickle, and {instead} holds the same")
            log.info("left out a pickle file", extra={"repo": str(repo), "file": path, "instead": instead})
        with self._sessions.open(repo) as session:
            work = Work(snapshot, progress, stop, session, token, ref)
            for file in wanted:
                progress.file(file.path, file.size)
            missing = self._reuse(work, wanted)
            progress.log(
                f"{len(wanted)} files, {len(missing)} to download: {sum(f.size for f in missing)} of "
                f"{sum(f.size for f in wanted)} bytes"
            )
            self._check_space(work, missing)
            self._reserve(work, wanted, missing)
            self._fetch_all(work, missing)
            self._catalog.quotas.release(session.name, repo, [REST])  # all stored by now, and charged
            files = {file.path: work.entries[file.path] for file in wanted}
            self._catalog.publisher.publish(
                repo,
                ref,
                files,
                commit=snapshot.commit,
                author=snapshot.author,
                message=f"Pulled from {self._endpoint}",
                time=snapshot.time,
                lineage=snapshot.lineage,
                kind=kind,
                payer=session.name,
                also=check,
            )

    def _reserve(self, work: Work, wanted: list[RemoteFile], missing: list[RemoteFile]) -> None:
        """Have room for all of it under the repository's quotas, before anything is downloaded."""
        large = sorted((file for file in missing if file.sha256), key=lambda file: -file.size)[:SINGLE]
        wants = {file.sha256: Amount(0, file.size) for file in large if file.sha256}
        rest = sum({file.key: file.size for file in missing if file.sha256 not in wants}.values())
        wants |= {COMMIT: Amount(sum(file.size for file in wanted)), REST: Amount(0, rest)}
        self._catalog.quotas.reserve(work.session.name, work.snapshot.repo, wants)

    def _reuse(self, work: Work, files: list[RemoteFile]) -> list[RemoteFile]:
        """Take what is held already; returns the rest."""
        repo = work.snapshot.repo
        known = stored_regular(self._catalog, repo, [file for file in files if not file.lfs])
        missing = []
        for file in files:
            sha256 = file.sha256 or known.get(file.key)
            entry = None if sha256 is None else work.session.reuse(sha256)
            if entry is None:
                missing.append(file)
            else:
                work.done(file, entry)
        return missing

    def _check_space(self, work: Work, missing: list[RemoteFile]) -> None:
        """Raise NoSpace when what is missing will not fit, before anything is downloaded.

        A file lies in the spool until it is stored, so as many as are under way at a time are counted twice.
        """
        repo = work.snapshot.repo
        here = sum(min(self._spool.partial(repo, file).allocated, file.size) for file in missing)
        largest = sorted((file.size for file in missing), reverse=True)
        need = {"store": sum(largest), "spool": max(0, sum(largest[: self._files]) - here)}
        need["both"] = need["store"] + need["spool"]
        for disk, free in self._flights.free_bytes().items():
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
        tries = 1

        def advance(here: int, attempt: int) -> None:
            nonlocal tries
            if attempt > tries:
                tries = attempt
                work.progress.log(f"{file.path}: wrong bytes came, downloading it again")
            work.progress.done(file.path, here)

        entry = None if file.sha256 is None else work.session.reuse(file.sha256)  # another pull may have brought it
        if entry is not None:
            work.done(file, entry)
            return
        flight = self._flights.join(work.snapshot.repo, work.snapshot.commit, file, work.token, work.ref)
        entry = flight.wait(work.stop, advance)
        work.done(file, work.session.reuse(entry.sha256) or entry)
