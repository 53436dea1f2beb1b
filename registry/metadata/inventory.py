"""What is stored, for reports and for looking at it: objects, and models' shares. Every function runs inside a
transaction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.claims import claimed, named
from registry.metadata.database import batches
from registry.metadata.repositories import Repository
from registry.metadata.tables import (
    blob_objects,
    blobs,
    chunks,
    commits,
    doomed,
    is_there,
    objects,
    repositories,
    repository_blobs,
)


@dataclass(frozen=True, slots=True)
class Stored:
    """An object's row; sizes in bytes."""

    number: int
    key: str
    size: int


def find_object(connection: Connection, key: str) -> Stored | None:
    """The object's row, or None."""
    o = objects.c
    row = connection.execute(sa.select(o.id, o.key, o.size).where(o.key == key)).one_or_none()
    return None if row is None else Stored(*row)


def objects_after(connection: Connection, domain: str, after: int, limit: int) -> list[Stored]:
    """Objects with rows, by number."""
    o = objects.c
    query = sa.select(o.id, o.key, o.size).where(o.domain == domain, o.id > after).order_by(o.id).limit(limit)
    return [Stored(*row) for row in connection.execute(query)]


def numbers_of(connection: Connection, domain: str, digests: Collection[str]) -> set[int]:
    """The objects that these blobs need."""
    out: set[int] = set()
    for batch in batches(sorted(digests)):
        where = (blob_objects.c.domain == domain) & blob_objects.c.sha256.in_(batch)
        out |= set(connection.scalars(sa.select(blob_objects.c.object).where(where)))
    return out


def records(connection: Connection, repository: int | None) -> list[tuple[str, str, str, str]]:
    """Every commit, or every one of a repository: (domain, repository's name, commit, manifest)."""
    r = repositories.c
    query = sa.select(r.domain, r.name, commits.c.commit, commits.c.manifest).join_from(
        commits, repositories, commits.c.repository == r.id
    )
    query = query.where(is_there())
    if repository is not None:
        query = query.where(commits.c.repository == repository)
    return [(domain, name, commit, manifest) for domain, name, commit, manifest in connection.execute(query)]


def commits_with(connection: Connection, domain: str, manifest: str) -> list[tuple[Repository, str]]:
    """The commits of a domain that have the manifest, with their repositories."""
    r = repositories.c
    query = sa.select(r.id, r.name, r.domain, r.updated, commits.c.commit).join_from(
        commits, repositories, commits.c.repository == r.id
    )
    found = connection.execute(query.where(r.domain == domain, commits.c.manifest == manifest).order_by(r.name))
    return [(Repository(*fields), commit) for *fields, commit in found]


def commits_of(connection: Connection, name: str) -> list[tuple[str, str, bytes]]:
    """Every commit of the repository with its manifest's digest and its record, the newest first."""
    query = sa.select(commits.c.commit, commits.c.manifest, commits.c.record).join_from(
        commits, repositories, commits.c.repository == repositories.c.id
    )
    found = connection.execute(query.where(repositories.c.name == name).order_by(commits.c.touched.desc()))
    return [(commit, manifest, record) for commit, manifest, record in found]


def strays(connection: Connection, keys: Collection[str]) -> set[str]:
    """Those of the stored objects that nothing names, claims or is going to delete."""
    found = set(keys) - named(connection, keys) - claimed(connection, keys)
    for batch in batches(sorted(found)):
        found -= set(connection.scalars(sa.select(doomed.c.key).where(doomed.c.key.in_(batch))))
    return found


def lies_in(connection: Connection, number: int, ids: Collection[bytes]) -> set[bytes]:
    """Those of the chunks whose rows say that they lie in the object."""
    out: set[bytes] = set()
    for batch in batches(sorted(ids)):
        query = sa.select(chunks.c.id).where(chunks.c.object == number, chunks.c.id.in_(batch))
        out |= {bytes(id_) for id_ in connection.scalars(query)}
    return out


def forget_chunks(connection: Connection, number: int, ids: Collection[bytes]) -> None:
    """Forget chunks of an object that no blob needs, so that none comes to rely on them."""
    for batch in batches(sorted(ids)):
        connection.execute(chunks.delete().where(chunks.c.object == number, chunks.c.id.in_(batch)))


def holders(connection: Connection, domain: str, sha256: str) -> list[str]:
    """Names of the repositories that hold a blob."""
    query = sa.select(repositories.c.name).join(repository_blobs, repository_blobs.c.repository == repositories.c.id)
    query = query.where(repositories.c.domain == domain, repository_blobs.c.sha256 == sha256)
    return list(connection.scalars(query.order_by(repositories.c.name)))


@dataclass(frozen=True, slots=True)
class Share:
    """A repository's bytes. ``stored``: of the objects that it needs, each divided among the blobs that need it, by
    their sizes, and a blob's part among the repositories that hold it. So the shares add up to what is stored."""

    repo: str
    logical: int
    unique: int
    stored: float


def shares(connection: Connection, domain: str) -> tuple[list[Share], float]:
    """Every repository's share, and the stored bytes that none holds: of pushes under way, and garbage."""
    logical = dict(
        connection.execute(
            sa.select(commits.c.repository, sa.func.sum(commits.c.size)).group_by(commits.c.repository)
        ).all()
    )
    b, o = blobs.c, blob_objects.c
    same = (b.domain == o.domain) & (b.sha256 == o.sha256)
    # An empty blob has a recipe to pay for, too.
    weight = sa.cast(b.size + 1, sa.Double)
    per_object = (
        sa.select(o.object, sa.func.sum(weight).label("total"))
        .join_from(blob_objects, blobs, same)
        .where(o.domain == domain)
        .group_by(o.object)
        .subquery()
    )
    per_blob = (
        sa.select(o.sha256, sa.func.sum(objects.c.size * weight / per_object.c.total).label("stored"))
        .join_from(blob_objects, blobs, same)
        .join(per_object, per_object.c.object == o.object)
        .join(objects, objects.c.id == o.object)
        .where(o.domain == domain)
        .group_by(o.sha256)
        .subquery()
    )
    held = (
        sa.select(repository_blobs.c.sha256, sa.func.count().label("count"))
        .join(repositories, repositories.c.id == repository_blobs.c.repository)
        .where(repositories.c.domain == domain)
        .group_by(repository_blobs.c.sha256)
        .subquery()
    )
    query = (
        sa.select(
            repository_blobs.c.repository,
            sa.func.sum(b.size),
            sa.func.sum(per_blob.c.stored / held.c.count),
        )
        .join_from(repository_blobs, blobs, (b.sha256 == repository_blobs.c.sha256) & (b.domain == domain))
        .join(per_blob, per_blob.c.sha256 == b.sha256)
        .join(held, held.c.sha256 == b.sha256)
        .group_by(repository_blobs.c.repository)
    )
    found = {number: (int(unique), float(stored)) for number, unique, stored in connection.execute(query)}
    r = repositories.c
    out = []
    for number, name in connection.execute(sa.select(r.id, r.name).where(r.domain == domain).order_by(r.name)):
        unique, stored = found.get(number, (0, 0.0))
        out.append(Share(name, int(logical.get(number) or 0), unique, stored))
    everything = connection.scalar(sa.select(sa.func.sum(objects.c.size)).where(objects.c.domain == domain)) or 0
    return out, float(everything) - sum(share.stored for share in out)
