"""What a caller may publish by naming its hash, without sending it: what it has sent, or may read anyway.

Who knows no more of a content than its hash must not get it by publishing it, nor learn from an answer whether
somebody out of its sight has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Final

from helios.errors import NotFound, Quarantined
from helios.names import RepoId
from heliosfs.store.placement import ChunkLocation
from heliosfs.store.recipe import Recipe
from registry.access import Lister
from registry.catalog import Catalog
from registry.metadata import claims, content

MAX_RECIPES: Final = 256
"""Most recipes that are read for one question: chunks that are in none of them have to be sent."""


class Possession:
    """Blocking; called in threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def may_name(self, sight: Lister, repo: RepoId, sha256: str) -> bool:
        """Whether a blob is held by the repository, or by one in its domain that the caller may read."""
        try:
            self._catalog.contents.held(repo, sha256)
        except (NotFound, Quarantined):
            return self._shown(sight, self._catalog.domain_of(repo), sha256)
        return True

    def chunks(
        self,
        sight: Lister,
        session: str,
        domain: str,
        own: Iterable[str],
        recipe: Recipe,
        places: Sequence[ChunkLocation | None],
    ) -> list[ChunkLocation | None]:
        """Where the chunks lie that the caller may name, None for the others: ``places`` are those in the domain.

        ``own`` are recipes of what it has sent already; of chunks that it has sent, ``session`` has claims.
        """
        if sight.all:
            return list(places)
        wanted = {recipe.id(index): place.object_key for index, place in enumerate(places) if place is not None}
        with self._catalog.database.read() as connection:
            sent = claims.claims_of(connection, session)
            blobs = content.needing(connection, domain, set(wanted.values()))
        may = {id_ for id_ in wanted if claims.of_chunk(domain, id_) in sent}
        visible = (b.recipe for b in blobs if self._shown(sight, domain, b.sha256))
        for digest in islice(chain(own, visible), MAX_RECIPES):
            if len(may) == len(wanted):
                break
            may |= wanted.keys() & {id_ for id_, _ in self._catalog.contents.recipe(domain, digest).chunks()}
        return [place if recipe.id(index) in may else None for index, place in enumerate(places)]

    def _shown(self, sight: Lister, domain: str, sha256: str) -> bool:
        return any(sight.shows(str(holder)) for holder in self._catalog.contents.holders(domain, sha256))
