"""Leases on commits: whoever uses one for long says so, and it stays, whatever happens to its refs."""

from __future__ import annotations

from typing import Final

from helios.errors import Conflict, InvalidInput
from helios.names import RepoId
from registry.catalog import Catalog
from registry.metadata import pins, repositories
from registry.metadata.database import Changes

MAX_S: Final = 30 * 86400.0
"""Longest lease, in seconds: who forgets to end one does not keep a commit for ever."""
MAX_HELD: Final = 10_000
"""Most commits that one holder keeps."""
MAX_NAME: Final = 200


class Leases:
    """Of one registry. Blocking: routes call it in threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def pin(self, holder: str, repo: RepoId, commit: str, seconds: float) -> float:
        """Keep a commit for so long from now on, 0: no longer; returns until when, in seconds since 1970 UTC.

        A later call counts instead of an earlier one of the same holder. Raises RepoNotFound or RevisionNotFound.
        """
        if not 0 < len(holder) <= MAX_NAME or not holder.isprintable():
            raise InvalidInput(f"{holder[:80]!r} names no holder: use 1 to {MAX_NAME} printable characters")
        if not 0 <= seconds <= MAX_S:
            raise InvalidInput(f"a lease of {seconds} s is not one of 0 to {MAX_S:.0f} s")
        database = self._catalog.database
        with database.write(changes=Changes.NOTHING) as connection:
            now = pins.clock(connection, database.kind.now)
            repository = repositories.require(connection, repo)
            repositories.require_commit(connection, repository, commit)
            pins.unpin(connection, holder, repository, commit)
            if seconds:
                if pins.count_pins(connection, holder) >= MAX_HELD:
                    raise Conflict(f"{holder} keeps {MAX_HELD} commits already; give some back")
                pins.pin(connection, holder, repository, commit, now + seconds)
        return now + seconds

    def all(self) -> list[pins.Pin]:
        """Every lease that holds."""
        with self._catalog.database.read() as connection:
            return pins.pins_of(connection, pins.clock(connection, self._catalog.database.kind.now))
