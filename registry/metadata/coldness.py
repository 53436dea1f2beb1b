"""What is cold, in SQL: when blobs were read last, and which objects hold chunks that nobody has read for a while.

Every function runs inside a transaction; times are unix seconds.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from heliosfs.store.placement import NO_CODEC
from registry.metadata.content import is_needed
from registry.metadata.database import batches
from registry.metadata.inventory import Stored
from registry.metadata.tables import blob_objects, blobs, chunks, claims, objects


def note_reads(connection: Connection, domain: str, digests: Collection[str], when: int) -> None:
    """Blobs were read at that time."""
    b = blobs.c
    for batch in batches(sorted(digests)):
        where = (b.domain == domain) & b.sha256.in_(batch) & (b.last_read < when)
        connection.execute(blobs.update().where(where).values(last_read=when))


def cold_objects(
    connection: Connection,
    domain: str,
    before: float,
    least: int,
    gain: float,
    numbers: range,
    limit: int,
) -> list[Stored]:
    """Objects of these numbers that hold chunks as they came, of ``least`` bytes or more: so many at most, in order.

    They were stored before that time, none of their blobs was read since or is on its way, and they were not found to
    save less than ``gain``. What is encrypted looks like noise, and stays.
    """
    o = objects.c
    kinds = sa.or_(*(o.key.startswith(f"{domain}/{kind}/", autoescape=True) for kind in ("blobs", "packs")))
    raw = sa.select(chunks.c.id).where(chunks.c.object == o.id, chunks.c.codec == NO_CODEC).exists()
    secret = sa.select(chunks.c.id).where(chunks.c.object == o.id, chunks.c.key_id.is_not(None)).exists()
    same = (blobs.c.domain == blob_objects.c.domain) & (blobs.c.sha256 == blob_objects.c.sha256)
    warm = sa.select(blobs.c.sha256).join_from(blob_objects, blobs, same).where(blob_objects.c.object == o.id)
    warm = warm.where(sa.or_(blobs.c.last_read >= before, blobs.c.pending))
    claimed = sa.select(claims.c.key).where(claims.c.key == o.key).exists()
    query = sa.select(o.id, o.key, o.size).where(
        o.domain == domain,
        o.id >= numbers.start,
        o.id < numbers.stop,
        o.size >= least,
        o.created < before,
        sa.or_(o.gain.is_(None), o.gain >= gain),
        kinds,
        is_needed(),
        raw,
        ~secret,
        ~warm.exists(),
        ~claimed,
    )
    return [Stored(*row) for row in connection.execute(query.order_by(o.id).limit(limit))]


def last_object(connection: Connection) -> int:
    """The highest number of an object."""
    return connection.scalar(sa.select(sa.func.max(objects.c.id))) or 0


def note_gain(connection: Connection, number: int, gain: float) -> None:
    """What encoding the chunks of an object would save, as a share of its size."""
    connection.execute(objects.update().where(objects.c.id == number).values(gain=gain))
