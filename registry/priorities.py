"""Which models matter more: classes that people give repositories or refs, and what follows from them.

``critical`` goes before ``normal``, and that before ``scratch``: among pulls that wait for their turn and among
downloads that wait for a connection to the upstream. Nodes ask for the classes, too, and evict by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from helios.errors import InvalidInput, Unavailable
from helios.names import RepoId, check_ref, is_commit
from registry.cache import Cache
from registry.metadata import priorities
from registry.metadata.database import Changes, Database
from registry.metadata.priorities import Given

CLASSES: Final = ("critical", "normal", "scratch")
"""The most important first; a class's place is its rank."""
NORMAL: Final = CLASSES.index("normal")


class Priorities:
    """The classes of one registry, kept in memory until something changes. Threads may share it."""

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        self._database, self._now = database, now
        self._ranks: Cache[str, dict[tuple[str, str], int]] = Cache(1)

    def forget(self) -> None:
        """Something may have changed, here or in another process."""
        self._ranks.clear()

    def rank(self, repo: RepoId, revision: str) -> int:
        """How much a revision matters, 0 the most: as its ref's class says, else its repository's. Blocks.

        While the database is away all matter the same.
        """
        try:
            ranks = self._ranks.get("", self._load)
        except Unavailable:
            return NORMAL
        return ranks.get((str(repo), revision), ranks.get((str(repo), ""), NORMAL))

    def _load(self) -> dict[tuple[str, str], int]:
        return {(each.repo, each.ref): CLASSES.index(each.priority) for each in self.all()}

    def all(self) -> list[Given]:
        """All that were given."""
        with self._database.read() as connection:
            return priorities.listing(connection)

    def put(self, repo: RepoId, ref: str | None, priority: str, author: str) -> None:
        """Give a repository (``ref`` None) or a ref a class; neither need be here yet."""
        if priority not in CLASSES:
            raise InvalidInput(f"{priority[:40]!r} is no class: there are {', '.join(CLASSES)}")
        given = Given(str(repo), _checked(ref), priority, author, int(self._now()))
        with self._database.write(changes=Changes.NAMES) as connection:
            priorities.put(connection, given)

    def remove(self, repo: RepoId, ref: str | None) -> None:
        """Take a class back. Raises NotFound where none was given."""
        with self._database.write(changes=Changes.NAMES) as connection:
            priorities.remove(connection, repo, _checked(ref))


def _checked(ref: str | None) -> str:
    if ref is not None and is_commit(ref):
        raise InvalidInput(f"{ref} is a commit: a class is for a repository or a ref of it")
    return "" if ref is None else check_ref(ref)
