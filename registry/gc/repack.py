"""Rewriting objects that are mostly garbage: what is needed of them goes into new packs, the objects go."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from helios.errors import Conflict, IntegrityError
from heliosfs.store.placement import NO_CODEC
from registry.catalog import Catalog
from registry.gc.copies import Copies, Copy, read_chunk
from registry.metadata import claims, moving
from registry.metadata.moving import Held

LEAST: Final = 0.5
"""Objects are rewritten when less than this share of their bytes is needed."""


class Repacker:
    """Looks at objects that removed blobs have left to others. ``keep_s``: see ``Copies``."""

    def __init__(self, catalog: Catalog, keep_s: float) -> None:
        self._catalog, self._copies = catalog, Copies(catalog, keep_s)

    def candidates(self, domain: str, losing: Collection[str] = ()) -> list[tuple[str, int]]:
        """(key, number) of a domain's objects that may be worth it, now or when the blobs ``losing`` have gone."""
        with self._catalog.database.read() as connection:
            found = dict(moving.partly_used(connection, domain))
            found.update(moving.shared_with(connection, domain, losing))
        return sorted(found.items(), key=lambda item: item[1])

    def garbage(self, key: str, number: int, without: Collection[str] = ()) -> int | None:
        """Bytes that rewriting the object would free; None where it is not worth it or a session relies on it."""
        users = {sha256: ids for sha256, ids in self._copies.users(key, number).items() if sha256 not in without}
        found = self._live(key, number, users)
        return None if found is None else found[1]

    def rewrite(self, key: str, number: int) -> int | None:
        """Rewrite the object if that is worth it; returns the bytes that it frees. Raises IntegrityError for a chunk
        that is damaged, NotFound for an object that is missing."""
        users = self._copies.users(key, number)
        found = self._live(key, number, users)
        if found is None:
            return None
        live, garbage = found
        try:
            encoded = any(chunk.at.codec != NO_CODEC for chunk in live)
            self._copies.replace(key, number, users, self._read(live), encoded=encoded)
        except Conflict:  # somebody needs the object after all; the next run looks again
            return None
        return garbage

    def _live(self, key: str, number: int, users: dict[str, set[bytes]]) -> tuple[list[Held], int] | None:
        """Its chunks that blobs need, and the bytes of the rest."""
        with self._catalog.database.read() as connection:
            size = moving.size_of(connection, number)
            held = moving.chunks_in(connection, number)
            busy = claims.claimed(connection, [key])
        if size is None or busy:
            return None
        wanted: set[bytes] = set().union(*users.values())
        live = [chunk for chunk in held if chunk.id in wanted]
        needed = sum(chunk.at.encoded_length for chunk in live)
        return None if needed >= LEAST * size else (live, size - needed)

    def _read(self, chunks: list[Held]) -> Iterator[Copy]:
        """The chunks as they are stored: what is encoded stays so."""
        for chunk in chunks:
            data = read_chunk(self._catalog.store, chunk)
            if data is None:
                raise IntegrityError(f"chunk {chunk.id.hex()} is damaged", hint="Run: helios store verify --repair")
            yield Copy(chunk.id, chunk.at.length, data, chunk.at.codec)
