"""What was downloaded and is not yet, or no longer, held by a commit: what stays, and what goes.

A stored file that no commit holds yet stays as long as its pull may be resumed (a week), or as long as a mirrored
snapshot lists it. The partial files in the spool go by the same rule.
"""

from __future__ import annotations

import time

from sqlalchemy.engine import Connection

from helios.names import RepoId
from registry.metadata import mirror as tables
from registry.metadata.database import Changes, Database
from registry.pull.flights import Flights
from registry.pull.listing import decode_listing
from registry.pull.spool import KEEP_S, Spool
from registry.sessions import Sessions


class Downloads:
    """Housekeeping for one registry."""

    def __init__(self, database: Database, sessions: Sessions, spool: Spool, flights: Flights) -> None:
        self._database, self._sessions, self._spool, self._flights = database, sessions, spool, flights

    def forget(self, repo: RepoId) -> None:
        """A pull of the repository succeeded, and nobody will resume older ones."""
        with self._database.write(changes=Changes.NOTHING) as connection:
            kept = _listed(connection, repo)
            gone = tables.drop_downloads(connection, repo, kept)
        self._spool.remove(repo, kept | self._flights.active(repo))
        self._sessions.release(gone)

    def expire(self, now: float | None = None) -> None:
        """Forget what nobody has resumed for a week; at start, while nothing is being downloaded."""
        now = time.time() if now is None else now
        gone: set[str] = set()
        with self._database.write(changes=Changes.NOTHING) as connection:
            for repo in tables.old_downloads(connection, int(now - KEEP_S)):
                gone |= tables.drop_downloads(connection, repo, _listed(connection, repo))
        self._spool.expire(now)
        self._sessions.release(gone)


def _listed(connection: Connection, repo: RepoId) -> set[str]:
    """Contents of the repository's mirrored snapshots whose files are not all here."""
    return {
        file.key for _, _, listing in tables.unpublished(connection, repo) for file in decode_listing(listing).files
    }
