"""Chunks, objects and blobs in SQL: what is stored, and where.

Chunk rows are the placements. Two ingests may store the same chunk at the same time: the first row wins, and the
second blob is recorded as needing the winner's object; its own copy is garbage when nothing else needs it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import Conflict, NotFound
from heliosfs.store.manifest import FileEntry
from heliosfs.store.placement import ChunkLocation
from registry.ingest.types import IngestedBlob, NewObject
from registry.metadata.claims import claimed, doom, of_blob
from registry.metadata.database import Changes, Database, batches, insert_new
from registry.metadata.tables import (
    GONE,
    blob_objects,
    blobs,
    chunks,
    claims,
    objects,
    repositories,
    repository_blobs,
)

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

    domain: str
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


def encoded_bytes(connection: Connection, domain: str, ids: Iterable[bytes]) -> int:
    """What these chunks take where they lie, in bytes."""
    query = sa.select(sa.func.coalesce(sa.func.sum(chunks.c.encoded), 0)).where(chunks.c.domain == domain)
    found = (connection.scalar(query.where(chunks.c.id.in_(batch))) for batch in batches(sorted(set(ids))))
    return sum(int(count or 0) for count in found)


def find_blob(connection: Connection, domain: str, sha256: str) -> KnownBlob | None:
    """The blob, or None when the store does not hold all of it."""
    c = blobs.c
    query = sa.select(c.domain, c.sha256, c.size, c.recipe, c.git_oid, c.lfs, c.version)
    row = connection.execute(query.where(c.domain == domain, c.sha256 == sha256)).one_or_none()
    return None if row is None else KnownBlob(*row)


def find_blobs(connection: Connection, domain: str, digests: Iterable[str]) -> dict[str, KnownBlob]:
    """Those of the blobs that the store holds, by sha256."""
    c = blobs.c
    query = sa.select(c.domain, c.sha256, c.size, c.recipe, c.git_oid, c.lfs, c.version).where(c.domain == domain)
    out = {}
    for batch in batches(sorted(set(digests))):
        out.update({row[1]: KnownBlob(*row) for row in connection.execute(query.where(c.sha256.in_(batch)))})
    return out


def is_pending(connection: Connection, domain: str, sha256: str) -> bool:
    """Whether the store holds the blob and no commit ever did: whoever stored it may still give it up."""
    c = blobs.c
    return connection.scalar(sa.select(c.pending).where(c.domain == domain, c.sha256 == sha256)) is True


def needing(connection: Connection, domain: str, keys: Iterable[str]) -> list[KnownBlob]:
    """The blobs that need any of these objects."""
    c = blobs.c
    joined = blobs.join(blob_objects, (blob_objects.c.domain == c.domain) & (blob_objects.c.sha256 == c.sha256))
    query = sa.select(c.domain, c.sha256, c.size, c.recipe, c.git_oid, c.lfs, c.version).distinct()
    query = query.select_from(joined.join(objects, objects.c.id == blob_objects.c.object)).where(c.domain == domain)
    found: dict[str, KnownBlob] = {}
    for batch in batches(sorted(set(keys))):
        found.update({row[1]: KnownBlob(*row) for row in connection.execute(query.where(objects.c.key.in_(batch)))})
    return list(found.values())


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


def pending_blobs(connection: Connection, after: tuple[str, str], limit: int) -> list[tuple[str, str, int]]:
    """At most so many blobs that no commit ever held, from the one that follows: (domain, sha256, bytes)."""
    c = blobs.c
    query = sa.select(c.domain, c.sha256, c.size).where(c.pending, sa.tuple_(c.domain, c.sha256) > sa.tuple_(*after))
    return [
        (domain, sha256, size)
        for domain, sha256, size in connection.execute(query.order_by(c.domain, c.sha256).limit(limit))
    ]


def drop_pending(connection: Connection, found: Iterable[tuple[str, str]]) -> None:
    """Forget those of the blobs that no commit ever held and no session claims, and the objects that only they need."""
    by_domain: dict[str, list[str]] = {}
    keys = {of_blob(domain, sha256): (domain, sha256) for domain, sha256 in found}
    for key in sorted(keys.keys() - claimed(connection, keys)):
        by_domain.setdefault(keys[key][0], []).append(keys[key][1])
    for domain, digests in by_domain.items():
        these = (blobs.c.domain == domain) & blobs.c.sha256.in_(digests)
        gone = list(connection.scalars(sa.select(blobs.c.sha256).where(these, blobs.c.pending, ~is_held())))
        mine = (blob_objects.c.domain == domain) & blob_objects.c.sha256.in_(gone)
        numbers = sorted(set(connection.scalars(sa.select(blob_objects.c.object).where(mine))))
        connection.execute(blob_objects.delete().where(mine))
        connection.execute(blobs.delete().where(blobs.c.domain == domain, blobs.c.sha256.in_(gone)))
        for batch in batches(numbers):
            drop_unneeded(connection, batch)


def unneeded(connection: Connection, after: int, limit: int) -> list[tuple[int, int]]:
    """At most so many objects that no blob needs and nobody claims, from the one that follows: (number, bytes)."""
    query = sa.select(objects.c.id, objects.c.size).where(objects.c.id > after, _is_unneeded())
    return [(number, size) for number, size in connection.execute(query.order_by(objects.c.id).limit(limit))]


def drop_unneeded(connection: Connection, numbers: Collection[int]) -> None:
    """Forget those of the objects that no blob needs and nobody claims, and doom them."""
    query = sa.select(objects.c.id, objects.c.key).where(objects.c.id.in_(sorted(numbers)), _is_unneeded())
    doom(connection, drop_objects(connection, dict(connection.execute(query).all())))


def _is_unneeded() -> sa.ColumnElement[bool]:
    return ~is_needed() & objects.c.key.not_in(sa.select(claims.c.key))


def outlast(connection: Connection, keys: Collection[str], until: float) -> None:
    """Keep what these blobs (``claims.of_blob``) lie in until then, of the database's clock, when they are forgotten.

    For those that no commit ever held and that were served nevertheless: readers know where they lie.
    """
    for key in sorted(keys):
        domain, _, sha256 = key.partition(":")
        needed = sa.select(blob_objects.c.object).join_from(
            blob_objects, blobs, (blobs.c.domain == blob_objects.c.domain) & (blobs.c.sha256 == blob_objects.c.sha256)
        )
        needed = needed.where(blobs.c.domain == domain, blobs.c.sha256 == sha256, blobs.c.pending)
        later = objects.c.id.in_(needed) & (objects.c.keep_until < until)
        connection.execute(objects.update().where(later).values(keep_until=until))


def any_unneeded(connection: Connection, keys: Iterable[str] | None = None) -> bool:
    """Whether ``removal.forget_leftovers`` may have something to do: for these that were claimed, or for any."""
    pending = sa.select(blobs.c.sha256).where(blobs.c.pending).limit(1)
    idle = sa.select(objects.c.id).where(~is_needed()).limit(1)
    if keys is None:
        return any(connection.scalar(query) is not None for query in (pending, idle))
    digests: dict[str, list[str]] = {}
    for key in sorted(keys):
        domain, _, sha256 = key.partition(":")
        digests.setdefault(domain if sha256 else "", []).append(sha256 or key)
    for domain, found in digests.items():
        for batch in batches(found):
            these = (blobs.c.domain == domain) & blobs.c.sha256.in_(batch)
            if connection.scalar(pending.where(these) if domain else idle.where(objects.c.key.in_(batch))) is not None:
                return True
    return False


def is_held() -> sa.ColumnElement[bool]:
    """Whether a commit of a repository in the same domain holds the row of ``blobs``."""
    same = (repository_blobs.c.sha256 == blobs.c.sha256) & (repositories.c.domain == blobs.c.domain)
    held = sa.select(repository_blobs.c.sha256)
    held = held.join(repositories, repository_blobs.c.repository == repositories.c.id)
    return held.where(same).exists()


def domains(connection: Connection) -> list[str]:
    """The domains in which something is stored, or a repository lies."""
    tables = (blobs, objects, repositories)
    named = (sa.select(table.c.domain).where(table.c.domain != GONE).distinct() for table in tables)
    return sorted(connection.scalars(sa.union(*named)))


def object_keys(connection: Connection) -> set[str]:
    """Keys of all objects that hold chunks or recipes."""
    return set(connection.scalars(sa.select(objects.c.key)))


def held_bytes(connection: Connection, domain: str | None = None) -> int:
    """Bytes of the distinct blobs that commits hold, in a domain or in all: a blob counts once in each."""
    query = sa.select(sa.func.coalesce(sa.func.sum(blobs.c.size), 0)).where(is_held())
    return int(connection.scalar(query if domain is None else query.where(blobs.c.domain == domain)) or 0)


def stored_bytes(connection: Connection, domain: str | None = None) -> int:
    """Bytes of all objects, or of those of a domain."""
    query = sa.select(sa.func.coalesce(sa.func.sum(objects.c.size), 0))
    return int(connection.scalar(query if domain is None else query.where(objects.c.domain == domain)) or 0)


def add_blob(connection: Connection, domain: str, blob: IngestedBlob) -> None:
    """Record a blob with its chunks and objects. Raises Conflict when an object that it needs has gone meanwhile."""
    placed = zip((digest for digest, _ in blob.recipe.chunks()), blob.locations, strict=True)
    add_chunks(connection, domain, blob.path, list(placed), blob.objects)
    _add_blob(connection, domain, blob)


def add_chunks(
    connection: Connection,
    domain: str,
    path: str,
    placed: Sequence[tuple[bytes, ChunkLocation]],
    made: Sequence[NewObject],
) -> None:
    """Record chunks of the file ``path`` with the objects made for them.

    Raises Conflict when an older object that they lie in has gone meanwhile.
    """
    add_objects(connection, domain, ((o.key, o.size) for o in made))
    keys = {location.object_key for _, location in placed}
    ids = _object_ids(connection, keys)
    if missing := keys - ids.keys():
        raise Conflict(f"{path}: the object {min(missing)} was removed while it was read; publish again")
    rows = {}
    for digest, location in placed:
        rows[digest] = {
            "domain": domain,
            "id": digest,
            "object": ids[location.object_key],
            "offset": location.offset,
            "length": location.length,
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


def is_needed() -> sa.ColumnElement[bool]:
    """Whether a blob needs the object."""
    return sa.select(blob_objects.c.object).where(blob_objects.c.object == objects.c.id).exists()


def drop_objects(connection: Connection, gone: Mapping[int, str]) -> list[str]:
    """Forget objects (number -> key) that no blob needs and nobody claims, and the chunks in them.

    Returns their keys. Those that readers may have been told of are doomed here, for the time when that is over.
    """
    numbers = sorted(gone)
    for batch in batches(numbers):
        query = sa.select(objects.c.key, objects.c.keep_until).where(objects.c.id.in_(batch), objects.c.keep_until > 0)
        for key, until in connection.execute(query).all():
            doom(connection, [key], until)
        connection.execute(chunks.delete().where(chunks.c.object.in_(batch)))
        connection.execute(objects.delete().where(objects.c.id.in_(batch)))
    return sorted(gone.values())
