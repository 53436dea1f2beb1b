"""Chunks, objects and blobs in SQL: what is stored, and where.

Chunk rows are the placements. Two ingests may store the same chunk at the same time: the first row wins, and the
second blob is recorded as needing the winner's object; its own copy is garbage when nothing else needs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import Conflict, NotFound
from heliosfs.store.manifest import FileEntry
from heliosfs.store.placement import ChunkLocation
from registry.ingest.types import IngestedBlob
from registry.metadata.claims import claimed, of_blob
from registry.metadata.database import Changes, Database, batches, insert_new
from registry.metadata.tables import blob_objects, blobs, chunks, claims, objects, repository_blobs

_LOCATION = (
    chunks.c.id,
    objects.c.key,
    chunks.c.offset,
    chunks.c.length,
    chunks.c.encoded,
    chunks.c.codec,
    chunks.c.key_id,
)


@dataclass(frozen=True, slots=True)
class KnownBlob:
    """A blob that the store holds whole; ``version`` is its placement's."""

    sha256: str
    size: int
    recipe: str
    git_oid: str
    lfs: bool
    version: int

    def entry(self, executable: bool = False) -> FileEntry:
        """The blob's line for a manifest."""
        return FileEntry(self.sha256, self.size, self.git_oid, self.recipe, self.lfs, executable)


class SqlChunkIndex:
    """The ingest's ``ChunkIndex`` on its own: for a store that nobody cleans meanwhile. Sessions have another one."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def find(self, domain: str, ids: Sequence[bytes]) -> list[ChunkLocation | None]:
        """See ``ChunkIndex.find``."""
        with self.database.read() as connection:
            known = locate(connection, domain, ids)
        return [known.get(id_) for id_ in ids]

    def recipe_of(self, domain: str, sha256: str) -> str | None:
        """See ``ChunkIndex.recipe_of``."""
        with self.database.read() as connection:
            known = find_blob(connection, domain, sha256)
        return None if known is None else known.recipe

    def add_blob(self, domain: str, blob: IngestedBlob) -> None:
        """See ``ChunkIndex.add_blob``. Raises Conflict when an older object that the blob needs has gone meanwhile."""
        with self.database.write(changes=Changes.NOTHING) as connection:
            add_blob(connection, domain, blob)


def locate(connection: Connection, domain: str, ids: Sequence[bytes]) -> dict[bytes, ChunkLocation]:
    """Where the known ones of these chunks lie."""
    found: dict[bytes, ChunkLocation] = {}
    query = sa.select(*_LOCATION).join_from(chunks, objects, chunks.c.object == objects.c.id)
    for batch in batches(list(set(ids))):
        for id_, *fields in connection.execute(query.where(chunks.c.domain == domain, chunks.c.id.in_(batch))):
            found[bytes(id_)] = ChunkLocation(*fields)
    return found


def find_blob(connection: Connection, domain: str, sha256: str) -> KnownBlob | None:
    """The blob, or None when the store does not hold all of it."""
    c = blobs.c
    query = sa.select(c.sha256, c.size, c.recipe, c.git_oid, c.lfs, c.version)
    row = connection.execute(query.where(c.domain == domain, c.sha256 == sha256)).one_or_none()
    return None if row is None else KnownBlob(*row)


def find_blobs(connection: Connection, domain: str, digests: Iterable[str]) -> dict[str, KnownBlob]:
    """Those of the blobs that the store holds, by sha256."""
    c = blobs.c
    query = sa.select(c.sha256, c.size, c.recipe, c.git_oid, c.lfs, c.version).where(c.domain == domain)
    out = {}
    for batch in batches(sorted(set(digests))):
        out.update({row[0]: KnownBlob(*row) for row in connection.execute(query.where(c.sha256.in_(batch)))})
    return out


def object_sizes(connection: Connection, keys: Iterable[str]) -> dict[str, int]:
    """Sizes of the known ones of these objects, in bytes."""
    out: dict[str, int] = {}
    for batch in batches(sorted(set(keys))):
        query = sa.select(objects.c.key, objects.c.size).where(objects.c.key.in_(batch))
        out.update(dict(connection.execute(query).all()))
    return out


def add_objects(connection: Connection, domain: str, found: Iterable[tuple[str, int]]) -> None:
    """Record objects by (key, size); known ones stay as they are."""
    now = int(time.time())
    rows = [{"domain": domain, "key": key, "size": size, "created": now} for key, size in found]
    insert_new(connection, objects, rows)


def publish_blobs(connection: Connection, domain: str, recipes: Mapping[str, str]) -> None:
    """Mark blobs, given with their recipes, as held by a commit.

    Raises NotFound naming one that the store does not hold, or does not hold any more as it was.
    """
    wanted = sorted(recipes)
    found = find_blobs(connection, domain, wanted)
    missing = [sha256 for sha256 in wanted if sha256 not in found or found[sha256].recipe != recipes[sha256]]
    if missing:
        raise NotFound(f"the store does not hold blob {min(missing)}; publish its file again")
    for batch in batches(wanted):
        where = (blobs.c.domain == domain) & blobs.c.sha256.in_(batch) & blobs.c.pending
        connection.execute(blobs.update().where(where).values(pending=False))


def drop_pending(connection: Connection, domain: str) -> list[str]:
    """Forget the blobs that no commit ever held and no session claims, and every object nobody needs or claims then.

    Returns the keys of the forgotten objects.
    """
    query = sa.select(blobs.c.sha256).where(blobs.c.domain == domain, blobs.c.pending)
    query = query.where(blobs.c.sha256.not_in(sa.select(repository_blobs.c.sha256)))
    pending = {of_blob(domain, sha256): sha256 for sha256 in connection.scalars(query)}
    gone = {pending[key] for key in pending.keys() - claimed(connection, pending)}
    for batch in batches(sorted(gone)):
        for table in (blob_objects, blobs):
            connection.execute(table.delete().where(table.c.domain == domain, table.c.sha256.in_(batch)))
    return _drop_unneeded(connection, domain)


def any_unneeded(connection: Connection, domain: str, keys: Iterable[str] | None = None) -> bool:
    """Whether ``drop_pending`` may have something to do: for these that were claimed, or for any."""
    pending = sa.select(blobs.c.sha256).where(blobs.c.domain == domain, blobs.c.pending).limit(1)
    idle = sa.select(objects.c.id).where(objects.c.domain == domain, ~_is_needed()).limit(1)
    if keys is None:
        return any(connection.scalar(query) is not None for query in (pending, idle))
    for batch in batches(sorted(keys)):
        digests = [key.partition(":")[2] for key in batch]
        for query in (pending.where(blobs.c.sha256.in_(digests)), idle.where(objects.c.key.in_(batch))):
            if connection.scalar(query) is not None:
                return True
    return False


def object_keys(connection: Connection, domain: str) -> set[str]:
    """Keys of all objects that hold chunks or recipes."""
    return set(connection.scalars(sa.select(objects.c.key).where(objects.c.domain == domain)))


def stored_bytes(connection: Connection) -> int:
    """Bytes of all objects."""
    return int(connection.scalar(sa.select(sa.func.coalesce(sa.func.sum(objects.c.size), 0))) or 0)


def add_blob(connection: Connection, domain: str, blob: IngestedBlob) -> None:
    """Record a blob with its chunks and objects. Raises Conflict when an object that it needs has gone meanwhile."""
    add_objects(connection, domain, ((o.key, o.size) for o in blob.objects))
    _add_chunks(connection, domain, blob)
    _add_blob(connection, domain, blob)


def _add_chunks(connection: Connection, domain: str, blob: IngestedBlob) -> None:
    keys = {location.object_key for location in blob.locations}
    ids = _object_ids(connection, keys)
    if missing := keys - ids.keys():
        raise Conflict(f"{blob.path}: the object {min(missing)} was removed while it was read; publish again")
    rows = {}
    for (digest, length), location in zip(blob.recipe.chunks(), blob.locations, strict=True):
        rows[digest] = {
            "domain": domain,
            "id": digest,
            "object": ids[location.object_key],
            "offset": location.offset,
            "length": length,
            "encoded": location.encoded_length,
            "codec": location.codec,
            "key_id": location.key,
        }
    insert_new(connection, chunks, list(rows.values()))


def _add_blob(connection: Connection, domain: str, blob: IngestedBlob) -> None:
    entry = blob.entry
    values = {
        "domain": domain,
        "sha256": entry.sha256,
        "size": entry.size,
        "recipe": entry.recipe,
        "git_oid": entry.git_oid,
        "lfs": entry.lfs,
        "version": 1,
        "pending": True,
    }
    insert_new(connection, blobs, [values])
    # What the chunk rows say now, which need not be what this ingest wrote: the first writer of a chunk wins.
    ids = [digest for digest, _ in blob.recipe.chunks()]
    needed = {location.object_key for location in locate(connection, domain, ids).values()}
    needed |= {key for key in (o.key for o in blob.objects) if "/packs/" not in key}
    rows = [
        {"domain": domain, "sha256": entry.sha256, "object": id_} for id_ in _object_ids(connection, needed).values()
    ]
    insert_new(connection, blob_objects, rows)


def _object_ids(connection: Connection, keys: Iterable[str]) -> dict[str, int]:
    out: dict[str, int] = {}
    for batch in batches(sorted(keys)):
        query = sa.select(objects.c.key, objects.c.id).where(objects.c.key.in_(batch))
        out.update(dict(connection.execute(query).all()))
    return out


def _is_needed() -> sa.ColumnElement[bool]:
    return sa.select(blob_objects.c.object).where(blob_objects.c.object == objects.c.id).exists()


def _drop_unneeded(connection: Connection, domain: str) -> list[str]:
    unclaimed = objects.c.key.not_in(sa.select(claims.c.key))
    query = sa.select(objects.c.id, objects.c.key).where(objects.c.domain == domain, ~_is_needed(), unclaimed)
    gone = dict(connection.execute(query).all())
    for batch in batches(sorted(gone)):
        connection.execute(chunks.delete().where(chunks.c.object.in_(batch)))
        connection.execute(objects.delete().where(objects.c.id.in_(batch)))
    return sorted(gone.values())
