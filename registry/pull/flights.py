"""The downloads under way: one for each content, however many want it.

A file of the Large File Storage is known by its sha256, so all repositories of a domain share its download; a regular
file only by its git oid, which is a sha1 and not believed across repositories. Each flight has a thread of its own. All
are fetched at the same time, over a bounded number of connections; a few large files and a few small ones are ingested
at a time, so that a tokenizer never waits for weights.

All ingests of one busy time share a session of the store for each domain, which ends when nothing is under way. What it
stored is written down (``downloads``) before, so that it stays until a commit holds it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial as partial_
from typing import Final

from helios.errors import HeliosError, NoSpace, Unavailable
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.ingest import Source
from registry.metadata import mirror as tables
from registry.metadata.database import Changes, Database
from registry.metadata.quotas import Amount
from registry.pull.blocks import PIECE
from registry.pull.flight import Flight
from registry.pull.known import stored_regular
from registry.pull.listing import RemoteFile
from registry.pull.sharing import Lead, Sharing
from registry.pull.spool import Partial, Spool
from registry.pull.turns import Turns
from registry.pull.upstream import Token, Upstream
from registry.sessions import Session, Sessions

log = logging.getLogger("helios.registry.pull")

LARGE: Final = 8
"""Large files that are ingested at a time: each holds buffers."""
SMALL: Final = 16
MOST: Final = 2000
"""Flights that may be under way, each with a thread."""
SLACK: Final = 64 << 20
"""Bytes that stay free on a disk that downloads are written to."""
CLOSE_S: Final = 3.0

Stored = Callable[[RepoId, RemoteFile, FileEntry], None]
FreeBytes = Callable[[], dict[str, int]]


class Flights:
    """All downloads of one registry. Threads may share it; close it at shutdown."""

    def __init__(
        self,
        client: Upstream,
        database: Database,
        sessions: Sessions,
        spool: Spool,
        *,
        connections: int,
        finish: bool,
        free_bytes: FreeBytes,
        fetched: Callable[[int], object] = lambda count: None,
        sharing: Sharing | None = None,
    ) -> None:
        """``sharing`` knows the registry's other processes; ``fetched`` is told of bytes that came; ``finish``: go on
        when nobody wants a file any more; ``free_bytes`` tells the bytes free on ``spool`` and ``store``; one key,
        ``both``, when they share a disk."""
        self._client, self._database, self._sessions, self._spool = client, database, sessions, spool
        self._connections = Turns(connections)
        self._finish, self.free_bytes, self._fetched = finish, free_bytes, fetched
        self._sharing = sharing
        self._slots = {False: threading.BoundedSemaphore(SMALL), True: threading.BoundedSemaphore(LARGE)}
        self._lock = threading.Lock()
        self._flights: dict[str, Flight] = {}
        self._threads = 0
        self._open: dict[str, Session] = {}
        self._listeners: list[Stored] = []
        self._closed = threading.Event()

    def listen(self, stored: Stored) -> None:
        """Call ``stored``, from a flight's thread, for each file that is stored, before anybody waiting hears of it."""
        self._listeners.append(stored)

    def join(self, repo: RepoId, commit: str, file: RemoteFile, token: Token, revision: str | None = None) -> Flight:
        """The flight that brings this file: the one under way, or a new one; one that is over where the store has it.
        It matters as much as the revision (None: the commit) does.

        Raises Unavailable or NoSpace.
        """
        domain = self._domain_of(repo)
        key = f"{domain} {file.key}" if file.lfs else f"{repo} {file.key}"
        with self._lock:
            if self._closed.is_set():
                raise Unavailable("the registry is stopping")
            flight = self._flights.get(key)
            thread = None
            if flight is None or flight.over:
                if len(self._flights) >= MOST:
                    raise Unavailable(f"{MOST} downloads are under way already", hint="Try again in a while.")
                partial = self._spool.partial(repo, file)
                entry = self._held(repo, file)
                if entry is not None:
                    return Flight.landed(self._client, repo, commit, file, partial, entry)
                self._check_space(file, partial)
                self._reserve(repo, file)
                held = partial_(self._held, repo, file)
                lead = None if self._sharing is None else self._sharing.lead(key, domain, held)
                flight = Flight(
                    self._client,
                    repo,
                    commit,
                    file,
                    partial,
                    self._connections,
                    finish=self._finish,
                    fetched=self._fetched,
                    lead=lead,
                )
                previous = self._flights.get(key)
                self._flights[key] = flight
                thread = threading.Thread(
                    target=self._run, args=(key, flight, previous, lead), name=f"flight {file.path}"[:60], daemon=True
                )
            else:
                self._reserve(repo, file)
            flight.add_token(token)
            flight.matters(lambda: self._sessions.catalog.priorities.rank(repo, revision or commit))
            if thread is not None:
                thread.start()
                self._threads += 1  # with the lock held, which it takes before it ends
        return flight

    def find(self, key: str) -> Flight | None:
        """The flight of a content, if one is under way."""
        with self._lock:
            return self._flights.get(key)

    def active(self, repo: RepoId) -> set[str]:
        """Contents of the repository that are being fetched."""
        with self._lock:
            return {flight.file.key for flight in self._flights.values() if flight.repo == repo}

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Stop all flights and wait for their threads, within bounds: whoever was the last one ends sessions in the
        database after its flight. What they have downloaded stays."""
        with self._lock:
            self._closed.set()
            flights = list(self._flights.values())
        for flight in flights:
            flight.stop()
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with self._lock:
                if not self._threads:
                    return
            time.sleep(0.02)
        log.warning("downloads did not end in time", extra={"flights": len(flights)})

    def _held(self, repo: RepoId, file: RemoteFile) -> FileEntry | None:
        """The file, if the store has it: a flight may have ended since somebody looked."""
        catalog = self._sessions.catalog
        sha256 = file.sha256 or stored_regular(catalog, repo, [file]).get(file.key)
        return None if sha256 is None else catalog.contents.has_blob(self._domain_of(repo), sha256)

    def _check_space(self, file: RemoteFile, partial: Partial) -> None:
        need = {"store": file.size, "spool": max(0, file.size - partial.allocated)}
        need["both"] = need["store"] + need["spool"]
        for disk, free in self.free_bytes().items():
            if need[disk] + SLACK > free:
                raise NoSpace(
                    f"{file.path} needs {need[disk] + SLACK} bytes, but only {free} are free",
                    hint="Free some space, or put the store elsewhere (registry.store).",
                )

    def _run(self, key: str, flight: Flight, previous: Flight | None, lead: Lead | None) -> None:
        try:
            self._bring(key, flight, previous, lead)
        finally:
            with self._lock:
                self._threads -= 1
            flight.let_go()  # only now: nobody else waits for who still reads

    def _bring(self, key: str, flight: Flight, previous: Flight | None, lead: Lead | None) -> None:
        if previous is not None:
            previous.ended.wait()  # it may still be closing the partial file
        try:
            flight.run(lambda source: self._ingest(flight, source), lambda entry: self._stored(flight, entry))
        finally:
            if lead is not None:  # before anybody can begin another flight of the content here
                try:
                    lead.leave()
                except HeliosError as error:  # others ask us, and hear that we don't bring it any more
                    log.warning("a download could not be given back", extra={"error": error.message})
            with self._lock:
                if self._flights.get(key) is flight:
                    del self._flights[key]
                    if flight.entry is None:
                        self._give_back(flight.repo, flight.file)
                ended = [] if self._flights else list(self._open.values())
                if ended:
                    self._open = {}
            flight.ended.set()
            for session in ended:
                session.close()

    def _give_back(self, repo: RepoId, file: RemoteFile) -> None:
        """Nothing of the file will be stored now. With the lock held, so that no new flight has reserved it."""
        session = self._open.get(self._domain_of(repo))
        if session is None:
            return
        try:
            self._sessions.catalog.quotas.release(session.name, repo, [_content(file)])
        except HeliosError as error:  # it ends with the session
            log.warning("a reservation could not be given back", extra={"file": file.path, "error": error.message})

    def _ingest(self, flight: Flight, source: Source) -> FileEntry:
        file, slots = flight.file, self._slots[flight.file.size > PIECE]
        while not slots.acquire(timeout=0.2):
            flight.check()
        try:
            blob = self._shared(flight.repo).ingest(
                file.path, file.size, source, lfs=file.lfs, expect_sha256=file.sha256, expect_git_oid=file.git_oid
            )
        finally:
            slots.release()
        return blob.entry

    def _shared(self, repo: RepoId) -> Session:
        with self._lock:
            return self._opened(repo)

    def _opened(self, repo: RepoId) -> Session:
        """The session that all flights of the repository's domain share. With the lock held."""
        domain = self._domain_of(repo)
        if domain not in self._open:
            self._open[domain] = self._sessions.open(repo)
        return self._open[domain]

    def _domain_of(self, repo: RepoId) -> str:
        return self._sessions.catalog.domain_of(repo)

    def _reserve(self, repo: RepoId, file: RemoteFile) -> None:
        """Have room for the file under the repository's quotas; raises QuotaExceeded. With the lock held."""
        quotas = self._sessions.catalog.quotas
        if not quotas.concerning(repo):
            return
        try:
            quotas.reserve(self._opened(repo).name, repo, {_content(file): Amount(0, file.size)})
        except HeliosError:
            if not self._flights:
                sessions, self._open = list(self._open.values()), {}
                for session in sessions:
                    session.close()
            raise

    def _stored(self, flight: Flight, entry: FileEntry) -> None:
        with self._database.write(changes=Changes.NOTHING) as connection:
            now = int(self._sessions.catalog.now())
            tables.add_download(connection, flight.repo, flight.file.key, entry.sha256, now)
            self._sessions.catalog.quotas.landed(connection, flight.repo, _content(flight.file))
        for stored in self._listeners:
            try:
                stored(flight.repo, flight.file, entry)
            except HeliosError as error:  # the file is stored all the same
                log.warning("what follows a download failed", extra={"file": flight.file.path, "error": error.message})


def _content(file: RemoteFile) -> str:
    """What stands for the file's content among reservations."""
    return file.sha256 or file.key
