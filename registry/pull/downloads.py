"""What was downloaded and is not yet, or no longer, held by a commit: what stays, and what goes.

A stored file that no commit holds yet stays as long as its pull may be resumed (a week), or as long as a mirrored
snapshot lists it that a followed ref points at, or that was learnt not long ago (``keep_s``). Of a branch that moves
every day and of which somebody reads a file, what the others had is not kept for ever. Partial files in the spool go by
the same rule when a pull succeeds, or when nobody has touched them for a week.
"""

from __future__ import annotations

from sqlalchemy.engine import Connection

from helios.names import RepoId
from registry.metadata import content, pins
from registry.metadata import mirror as tables
from registry.metadata.database import Changes, Database
from registry.pull.flights import Flights
from registry.pull.listing import RemoteFile, decode_listing
from registry.pull.spool import KEEP_S, Spool
from registry.sessions import Sessions


class Downloads:
    """Housekeeping for one registry."""

    def __init__(
        self, database: Database, sessions: Sessions, spool: Spool, flights: Flights, *, keep_s: float
    ) -> None:
        self._keep_s = keep_s
        self._database, self._sessions, self._spool, self._flights = database, sessions, spool, flights

    def adopt(self, repo: RepoId, file: RemoteFile, sha256: str) -> None:
        """A file that is here is about to be served for a snapshot that lists it: if it came with a push that has not
        ended, and may end without a commit, it stays as if it had been downloaded."""
        domain = self._sessions.catalog.domain_of(repo)
        with self._database.read() as connection:
            if not content.is_pending(connection, domain, sha256):
                return
            if file.key in tables.find_downloads(connection, repo, [file.key]):
                return
        with self._database.write(changes=Changes.NOTHING) as connection:
            tables.add_download(connection, repo, file.key, sha256, int(self._sessions.catalog.now()))
        self._sessions.keep_needed()

    def forget(self, repo: RepoId) -> None:
        """A pull of the repository succeeded, and nobody will resume older ones."""
        with self._database.write(changes=Changes.NOTHING) as connection:
            kept = self._listed(connection, repo, self._sessions.catalog.now())
            gone = self._drop(connection, repo, kept)
        self._spool.remove(repo, kept | self._flights.active(repo))
        self._sessions.release({(self._sessions.catalog.domain_of(repo), sha256) for sha256 in gone})

    def expire(self, now: float | None = None) -> None:
        """Forget what nobody has resumed for a week; at start, and with each collection of garbage."""
        now = self._sessions.catalog.now() if now is None else now
        with self._database.write(changes=Changes.NOTHING) as connection:
            for repo in tables.old_downloads(connection, int(now - KEEP_S)):
                kept = self._listed(connection, repo, now) | self._flights.active(repo)
                self._drop(connection, repo, kept)
        self._spool.expire(now)
        self._sessions.keep_needed()

    def _drop(self, connection: Connection, repo: RepoId, kept: set[str]) -> set[str]:
        catalog = self._sessions.catalog
        until = pins.clock(connection, self._database.kind.now) + catalog.lease_s
        return tables.drop_downloads(connection, repo, catalog.domain_of(repo), kept, until)

    def _listed(self, connection: Connection, repo: RepoId, now: float) -> set[str]:
        """Contents of the repository's mirrored snapshots whose files are not all here, and may be wanted."""
        found = tables.unfinished(connection, repo, int(now - self._keep_s))
        return {file.key for listing in found for file in decode_listing(listing).files}
