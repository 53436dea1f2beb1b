"""Copies of chunks in new packs, for objects that are mostly garbage and chunks that were damaged.

The copy is claimed before it is written, like everything that is (registry/metadata/claims.py), and its rows change in
one transaction with the end of the claim. Nothing is ever written in place.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from blake3 import blake3
from sqlalchemy.engine import Connection

from helios.errors import Conflict, IntegrityError
from heliosfs.store.chunks import load
from heliosfs.store.codec import decode
from heliosfs.store.keys import domain_of
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import NO_CODEC, ChunkLocation
from registry.catalog import Catalog
from registry.claiming import ClaimingStore, Claims
from registry.ingest.staged import Packs
from registry.ingest.types import NewObject
from registry.metadata import claims, content, moving, pins
from registry.metadata.database import Changes
from registry.metadata.moving import Held


@dataclass(frozen=True, slots=True)
class Copy:
    """A chunk of ``length`` bytes as it is to be stored: ``data``, in a codec."""

    id: bytes
    length: int
    data: bytes
    codec: str = NO_CODEC

    def check(self, key: str) -> None:
        """Raises IntegrityError unless the data are the chunk: what is moved from ``key`` has been seen to be right."""
        if blake3(decode(self.codec, memoryview(self.data), self.length)).digest() != self.id:
            raise IntegrityError(f"chunk {self.id.hex()} of {key} does not match its hash")


def read_chunk(store: ObjectStore, chunk: Held) -> bytes | None:
    """A chunk's stored bytes, from whichever copy of the object has the right ones; None where none has.

    A store that keeps several repairs those that are wrong. Raises NotFound and what else the store raises.
    """
    buffer = bytearray(chunk.at.encoded_length)
    return None if load(store, chunk.at, chunk.id, memoryview(buffer)) is None else bytes(buffer)


class Copies:
    """Moves chunks out of objects. ``keep_s``: how long an object stays that nobody needs then, in seconds."""

    def __init__(self, catalog: Catalog, keep_s: float) -> None:
        self.catalog, self._keep_s = catalog, keep_s

    def users(self, key: str, number: int) -> dict[str, set[bytes]]:
        """The blobs that need an object, with their chunks."""
        with self.catalog.database.read() as connection:
            found = moving.users_of(connection, number)
        return {
            sha256: {id_ for id_, _ in self.catalog.contents.recipe(domain_of(key), digest).chunks()}
            for sha256, digest in found.items()
        }

    def replace(
        self, key: str, number: int, users: dict[str, set[bytes]], chunks: Iterable[Copy], *, encoded: bool = False
    ) -> int:
        """Store chunks in packs, and have everybody read them there instead of in the object.

        ``users`` is what ``users`` said; ``encoded``: chunks may be. Returns the bytes of the packs. Raises Conflict
        when a session has come to rely on the object meanwhile, IntegrityError for bytes that don't match their chunk.
        """
        catalog, session = self.catalog, secrets.token_hex(16)
        with catalog.database.write(lazy=True, changes=Changes.NOTHING) as connection:
            catalog.member.begin(connection, session)
        target = ClaimingStore(catalog.store, Claims(catalog.database, session))
        packs = Packs(target, domain_of(key), encoded=encoded)
        try:
            moved: dict[bytes, ChunkLocation] = {}
            for chunk in chunks:
                chunk.check(key)
                moved[chunk.id] = packs.write(chunk.id, memoryview(chunk.data), chunk.length, chunk.codec)
            stored: list[NewObject] = []
            packs.put(stored)
            with catalog.database.write() as connection:
                self._record(connection, session, key, number, users, moved, stored)
            return sum(o.size for o in stored)
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
        held = {chunk.id for chunk in moving.chunks_in(connection, number)}
        if moving.users_of(connection, number).keys() != users.keys() or not moved.keys() <= held:
            raise Conflict(f"what needs {key}, or is in it, has changed meanwhile")
        content.add_objects(connection, domain_of(key), ((o.key, o.size) for o in stored))
        until = pins.clock(connection, self.catalog.database.kind.now) + self._keep_s
        moving.move(connection, domain_of(key), number, moved, users, until)
        claims.end(connection, [session])
