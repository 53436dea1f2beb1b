"""Which objects models need, for saying where their bytes are. Every function runs inside a transaction."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.database import batches
from registry.metadata.mirror_tables import mirror_snapshots
from registry.metadata.tables import blob_objects, objects, repositories, repository_blobs


def objects_of_blobs(connection: Connection, domain: str, digests: Collection[str]) -> dict[str, int]:
    """The objects that these blobs need: key -> bytes."""
    out: dict[str, int] = {}
    query = sa.select(objects.c.key, objects.c.size).join(blob_objects, blob_objects.c.object == objects.c.id)
    query = query.where(blob_objects.c.domain == domain)
    for batch in batches(sorted(digests)):
        out.update(dict(connection.execute(query.where(blob_objects.c.sha256.in_(batch))).all()))
    return out


def objects_by_repository(connection: Connection) -> Iterator[tuple[str, str, int]]:
    """Every object that a repository needs, once for each: (repository's name, key, bytes)."""
    query = (
        sa.select(repositories.c.name, objects.c.key, objects.c.size)
        .distinct()
        .join_from(repositories, repository_blobs, repository_blobs.c.repository == repositories.c.id)
        .join(
            blob_objects,
            (blob_objects.c.sha256 == repository_blobs.c.sha256) & (blob_objects.c.domain == repositories.c.domain),
        )
        .join(objects, objects.c.id == blob_objects.c.object)
    )
    yield from connection.execute(query).tuples()


def unpublished(connection: Connection) -> list[tuple[str, str, bytes]]:
    """Listed upstream commits whose files are not all here: (repository's name, commit, listing)."""
    c = mirror_snapshots.c
    query = sa.select(c.repository, c.commit, c.listing).where(sa.not_(c.published))
    return [(name, commit, bytes(listing)) for name, commit, listing in connection.execute(query)]
