"""Which of a registry's processes brings a content from the upstream: one at a time, as a row in SQL says.

The row goes with the process that has it, so nobody waits for a dead one longer than for its lease; mostly for a
moment, because its connection to the database ends with it. Two may bring the same for a while where one of them was
taken for dead: that costs bytes, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from helios.errors import HeliosError
from heliosfs.store.manifest import FileEntry
from registry.catalog import Catalog
from registry.metadata import sharing
from registry.metadata.database import Changes
from registry.metadata.sharing import Owner
from registry.processes import Processes
from registry.xet.tokens import Grant

GRANT_S: Final = 600
"""How long a process may use what it was allowed, in seconds: their clocks may differ by minutes."""


class FlightGrant(Grant, frozen=True, array_like=True, tag="flight"):
    """Another process of this registry may read what comes of a content."""

    content: str


@dataclass(frozen=True, slots=True)
class Standing:
    """Another process (``owner``) brings the content, or the store has it (``entry``), or else it is ours to bring."""

    owner: Owner | None = None
    entry: FileEntry | None = None


class Sharing:
    """The contents of one registry that processes bring, as one of them sees it."""

    def __init__(self, catalog: Catalog, processes: Processes) -> None:
        self.catalog, self.processes = catalog, processes
        self.database, self.member = catalog.database, catalog.member

    def lead(self, content: str, domain: str, held: Callable[[], FileEntry | None]) -> Lead | None:
        """For one download of a content into a domain; None where there are no other processes. ``held`` looks into the
        store."""
        return Lead(self, content, domain, held) if self.database.kind.shared else None


class Lead:
    """Whose download of one content it is."""

    def __init__(self, all_: Sharing, content: str, domain: str, held: Callable[[], FileEntry | None]) -> None:
        self.content, self.domain, self.processes, self.catalog = content, domain, all_.processes, all_.catalog
        self._all, self._held = all_, held

    def look(self, gone: str | None = None) -> Standing:
        """Who brings the content now; us, where nobody does. ``gone`` is a process that says that it does not.

        Raises Unavailable.
        """
        database = self._all.database
        with database.read(single=True) as connection:
            found = sharing.owner(connection, self.content, database.kind)
        if found is None or found.process in (self._all.member.id, gone):
            with database.write(lazy=True, changes=Changes.NOTHING) as connection:
                self._all.member.present(connection)
                found = sharing.take(connection, self.content, self._all.member.id, database.kind, gone)
        if found is not None:
            return Standing(found)
        # Looked at when the row was ours: whoever had it gave it back after the file was in the store.
        return Standing(entry=self._held())

    def other(self) -> Owner | None:
        """Which other process brings the content now; None where none does."""
        with self._all.database.read(single=True) as connection:
            found = sharing.owner(connection, self.content, self._all.database.kind)
        return None if found is None or found.process == self._all.member.id else found

    def authorization(self) -> str:
        """The Authorization header for a request for the content to another process."""
        signer = self.processes.signer
        return f"Bearer {signer.sign(FlightGrant('', int(signer.clock()) + GRANT_S, self.content))}"

    def leave(self) -> None:
        """Let others bring the content, or find it in the store. Raises Unavailable."""
        database = self._all.database
        with database.write(lazy=True, changes=Changes.NOTHING) as connection:
            sharing.leave(connection, self.content, self._all.member.id)


def unreachable(error: HeliosError) -> bool:
    """Whether an error says nothing of what the other process does."""
    return error.status >= 500
