"""Copies of chunks in new packs, for objects that are mostly garbage and chunks that were damaged.

The copy is claimed before it is written, like everything that is (registry/metadata/claims.py), and its rows change in
one transaction with the end of the claim. Nothing is ever written in place.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable

from blake3 import blake3
from sqlalchemy.engine import Connection

from helios.errors import Conflict, IntegrityError
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import ChunkLocation
from registry.catalog import Catalog
from registry.claiming import ClaimingStore, Claims
from registry.ingest.staged import Packs
from registry.ingest.types import NewObject
from registry.metadata import claims, content, moving, pins
from registry.metadata.database import Changes


def read_chunk(store: ObjectStore, key: str, offset: int, length: int, id_: bytes) -> bytes | None:
    """A chunk's bytes, from whichever copy of the object has the right ones; None where none has.

    A store that keeps several repairs those that are wrong. Raises NotFound and what else the store raises.
    """

    def good(found: memoryview) -> bool:
        return blake3(found).digest() == id_

    data = bytearray(length)
    view = memoryview(data)
    store.read_into(key, offset, view)
    if not good(view) and store.heal(key, offset, length, good):
        store.read_into(key, offset, view)
    return bytes(data) if good(view) else None


class Copies:
    """Moves chunks out of objects. ``keep_s``: how long an object stays that nobody needs then, in seconds."""

    def __init__(self, catalog: Catalog, keep_s: float) -> None:
        self.catalog, self._keep_s = catalog, keep_s

    def users(self, number: int) -> dict[str, set[bytes]]:
        """The blobs that need an object, with their chunks."""
        with self.catalog.database.read() as connection:
            found = moving.users_of(connection, number)
        return {sha256: {id_ for id_, _ in self.catalog.recipe(digest).chunks()} for sha256, digest in found.items()}

    def replace(
        self, key: str, number: int, users: dict[str, set[bytes]], chunks: Iterable[tuple[bytes, bytes]]
    ) -> int:
        """Store chunks, given with their bytes, in packs, and have everybody read them there instead of in the object.

        ``users`` is what ``users`` said. Returns the bytes written. Raises Conflict when a session has come to rely on
        the object meanwhile, IntegrityError for bytes that don't match their chunk.
        """
        catalog, session = self.catalog, secrets.token_hex(16)
        with catalog.database.write(lazy=True, changes=Changes.NOTHING) as connection:
            catalog.member.begin(connection, session)
        packs = Packs(ClaimingStore(catalog.store, Claims(catalog.database, session)), catalog.domain)
        try:
            moved: dict[bytes, ChunkLocation] = {}
            for id_, data in chunks:
                if blake3(data).digest() != id_:
                    raise IntegrityError(f"chunk {id_.hex()} of {key} does not match its hash")
                moved[id_] = packs.write(id_, memoryview(data))
            stored: list[NewObject] = []
            packs.put(stored)
            with catalog.database.write() as connection:
                self._record(connection, session, key, number, users, moved, stored)
            return sum(place.length for place in moved.values())
        except BaseException:
            packs.abort()
            with catalog.database.write(changes=Changes.NOTHING) as connection:
                claims.end(connection, [session])
            raise

    def _record(
        self,
        connection: Connection,
        session: str,
        key: str,
        number: int,
        users: dict[str, set[bytes]],
        moved: dict[bytes, ChunkLocation],
        stored: Collection[NewObject],
    ) -> None:
        claims.require(connection, session)
        if claims.claimed(connection, [key], besides=session):
            raise Conflict(f"a push or pull under way relies on {key}")
        if moving.users_of(connection, number).keys() != users.keys():
            raise Conflict(f"what needs {key} has changed meanwhile")
        content.add_objects(connection, self.catalog.domain, ((o.key, o.size) for o in stored))
        until = pins.clock(connection, self.catalog.database.kind.now) + self._keep_s
        moving.move(connection, self.catalog.domain, number, moved, users, until)
        claims.end(connection, [session])
