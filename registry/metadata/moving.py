"""Chunks that get another place: rows that follow copied bytes. Every function runs inside a writing transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from heliosfs.store.placement import ChunkLocation
from registry.metadata.content import drop_objects, is_needed
from registry.metadata.database import batches, insert_new
from registry.metadata.tables import blob_objects, blobs, chunks, objects


@dataclass(frozen=True, slots=True)
class Held:
    """A chunk, and where its row says that it lies."""

    id: bytes
    at: ChunkLocation


def chunks_in(connection: Connection, number: int) -> list[Held]:
    """The chunks whose rows say that they lie in an object, by offset."""
    c = chunks.c
    query = sa.select(c.id, objects.c.key, c.offset, c.length, c.encoded, c.codec, c.key_id)
    query = query.join_from(chunks, objects, c.object == objects.c.id).where(c.object == number).order_by(c.offset)
    return [Held(bytes(id_), ChunkLocation(*fields)) for id_, *fields in connection.execute(query)]


def users_of(connection: Connection, number: int) -> dict[str, str]:
    """The blobs that need an object: sha256 -> recipe."""
    b = blobs.c
    same = (b.domain == blob_objects.c.domain) & (b.sha256 == blob_objects.c.sha256)
    query = sa.select(b.sha256, b.recipe).join_from(blob_objects, blobs, same).where(blob_objects.c.object == number)
    return dict(connection.execute(query).all())


def size_of(connection: Connection, number: int) -> int | None:
    """Bytes of an object; None where it has gone."""
    return connection.scalar(sa.select(objects.c.size).where(objects.c.id == number))


def partly_used(connection: Connection, domain: str) -> list[tuple[str, int]]:
    """Objects that some blob needs and one that has gone needed, too: (key, number)."""
    query = sa.select(objects.c.key, objects.c.id).where(objects.c.domain == domain, objects.c.keep_until > 0)
    found = connection.execute(query.where(is_needed()).order_by(objects.c.id))
    return [(key, number) for key, number in found if "/packs/" in key or "/blobs/" in key]


def shared_with(connection: Connection, domain: str, digests: Collection[str]) -> list[tuple[str, int]]:
    """Objects that these blobs need: (key, number)."""
    out: dict[int, str] = {}
    for batch in batches(sorted(digests)):
        query = sa.select(objects.c.id, objects.c.key).join(blob_objects, blob_objects.c.object == objects.c.id)
        query = query.where(blob_objects.c.domain == domain, blob_objects.c.sha256.in_(batch))
        out.update({n: key for n, key in connection.execute(query) if "/packs/" in key or "/blobs/" in key})
    return [(key, number) for number, key in sorted(out.items())]


def move(
    connection: Connection,
    domain: str,
    number: int,
    moved: Mapping[bytes, ChunkLocation],
    users: Mapping[str, Collection[bytes]],
    until: float,
) -> None:
    """Have chunks of object ``number`` lie elsewhere, in objects that have rows.

    ``users`` are the blobs that need the object, with their chunks. Their placements get a new version. Those none of
    whose chunks are left in the object don't need it any more; once nobody does it is doomed, for a time after
    ``until``: until then readers go by older placements.
    """
    keys = sorted({place.object_key for place in moved.values()})
    ids: dict[str, int] = {}
    for batch in batches(keys):
        query = sa.select(objects.c.key, objects.c.id).where(objects.c.key.in_(batch))
        ids.update(dict(connection.execute(query).all()))
    where = (chunks.c.domain == domain) & (chunks.c.id == sa.bindparam("chunk")) & (chunks.c.object == number)
    columns = {"object": "to", "offset": "at", "encoded": "takes", "codec": "how", "key_id": "with"}
    statement = chunks.update().where(where).values({column: sa.bindparam(name) for column, name in columns.items()})
    rows = [
        {"chunk": i, "to": ids[p.object_key], "at": p.offset, "takes": p.encoded_length, "how": p.codec, "with": p.key}
        for i, p in moved.items()
    ]
    for some in batches(rows):
        connection.execute(statement, list(some))
    left = {held.id for held in chunks_in(connection, number)}
    for sha256, wanted in users.items():
        new = {ids[moved[id_].object_key] for id_ in wanted if id_ in moved}
        insert_new(connection, blob_objects, [{"domain": domain, "sha256": sha256, "object": n} for n in sorted(new)])
        mine = (blob_objects.c.domain == domain) & (blob_objects.c.sha256 == sha256)
        if left.isdisjoint(wanted):
            connection.execute(blob_objects.delete().where(mine, blob_objects.c.object == number))
        if new:
            this = (blobs.c.domain == domain) & (blobs.c.sha256 == sha256)
            connection.execute(blobs.update().where(this).values(version=blobs.c.version + 1))
    later = (objects.c.id == number) & (objects.c.keep_until < until)
    connection.execute(objects.update().where(later).values(keep_until=until))
    query = sa.select(objects.c.id, objects.c.key).where(objects.c.id == number, ~is_needed())
    drop_objects(connection, dict(connection.execute(query).all()))
