"""What a session's ingests see of index and store: everything they are going to rely on is claimed on the way.

See registry/metadata/claims.py for the rules.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from sqlalchemy.engine import Connection

from heliosfs.store.objects import ObjectInfo, ObjectStore
from heliosfs.store.placement import ChunkLocation
from registry.burial import claim_unburied, withdraw
from registry.ingest.types import IngestedBlob, NewObject
from registry.metadata import claims, content
from registry.metadata.content import KnownBlob
from registry.metadata.database import Changes, Database


class Claims:
    """One session's claims. Threads may share it."""

    def __init__(self, database: Database, session: str) -> None:
        self.session = session
        self._database = database
        self._lock = threading.Lock()
        self._made: set[str] = set()

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that were not claimed through this object."""
        with self._lock:
            return set(keys) - self._made

    def claim(self, connection: Connection, keys: Iterable[str]) -> None:
        """Claim objects inside a writing transaction. Raises Unavailable when the session was ended."""
        keys = set(keys)
        claims.claim(connection, self.session, keys)
        with self._lock:
            self._made |= keys

    def announce(self, key: str) -> None:
        """Claim an object before it is written."""
        if self.missing([key]):
            claim_unburied(self._database, [key], lambda connection: self.claim(connection, [key]))

    def withdraw(self, store: ObjectStore, key: str) -> None:
        """Delete an object that was written in vain, unless others need it."""
        with self._lock:
            self._made.discard(key)
        withdraw(self._database, store, self.session, [key])


class ClaimingIndex:
    """The ingest's ``ChunkIndex`` on SQL: what it finds can't go while the session is under way."""

    def __init__(self, database: Database, claims_: Claims) -> None:
        self._database, self._claims = database, claims_

    def find(self, domain: str, ids: Sequence[bytes]) -> list[ChunkLocation | None]:
        """See ``ChunkIndex.find``."""
        with self._database.read() as connection:
            known = content.locate(connection, domain, ids)
        if self._claims.missing(place.object_key for place in known.values()):
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                known = content.locate(connection, domain, ids)  # again: what was there may have gone
                self._claims.claim(connection, (place.object_key for place in known.values()))
        return [known.get(id_) for id_ in ids]

    def recipe_of(self, domain: str, sha256: str) -> str | None:
        """See ``ChunkIndex.recipe_of``."""
        known = self.blob(domain, sha256)
        return None if known is None else known.recipe

    def blob(self, domain: str, sha256: str) -> KnownBlob | None:
        """A stored blob, claimed from here on, or None."""
        with self._database.read() as connection:
            known = content.find_blob(connection, domain, sha256)
        key = claims.of_blob(domain, sha256)
        if known is not None and self._claims.missing([key]):
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                known = content.find_blob(connection, domain, sha256)
                if known is not None:
                    self._claims.claim(connection, [key])
        return known

    def add_blob(self, domain: str, blob: IngestedBlob) -> None:
        """See ``ChunkIndex.add_blob``. Raises Unavailable when the session was ended."""
        with self._database.write(changes=Changes.NOTHING) as connection:
            self._claims.claim(connection, [claims.of_blob(domain, blob.entry.sha256)])
            content.add_blob(connection, domain, blob)

    def add_chunks(
        self, domain: str, where: str, placed: Sequence[tuple[bytes, ChunkLocation]], objects: Sequence[NewObject]
    ) -> None:
        """See ``GrowingIndex.add_chunks``. Raises Unavailable when the session was ended."""
        with self._database.write(changes=Changes.NOTHING) as connection:
            # No blob needs these objects yet: the claims alone keep them.
            self._claims.claim(connection, (made.key for made in objects))
            content.add_chunks(connection, domain, where, placed, objects)


class ClaimingStore:
    """The ingest's ``Target`` on an object store."""

    def __init__(self, store: ObjectStore, claims_: Claims) -> None:
        self._store, self._claims = store, claims_

    def staging(self) -> Path:
        return self._store.staging()

    def put_file(self, key: str, path: Path) -> None:
        self._claims.announce(key)
        self._store.put_file(key, path)

    def put_bytes(self, key: str, data: bytes) -> None:
        self._claims.announce(key)
        self._store.put_bytes(key, data)

    def info(self, key: str) -> ObjectInfo:
        return self._store.info(key)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._store.read_into(key, offset, buffer)

    def delete(self, key: str) -> None:
        self._claims.withdraw(self._store, key)
