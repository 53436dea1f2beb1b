"""Quotas in SQL: what is used, what is reserved, and counting it. Every function runs inside a transaction.

What is used is a count plus what was charged since (``quota_accounts``), so a publish costs the same however much there
is; what a count finds is exact. Sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.database import batches, insert_new
from registry.metadata.mirror_tables import downloads
from registry.metadata.quota_tables import quota_accounts, quota_reservations
from registry.metadata.tables import (
    blob_objects,
    blobs,
    commits,
    is_there,
    objects,
    repositories,
    repository_blobs,
)


@dataclass(frozen=True, slots=True)
class Amount:
    """Logical and stored bytes."""

    logical: int = 0
    stored: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.logical + other.logical, self.stored + other.stored)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.logical - other.logical, self.stored - other.stored)


@dataclass(frozen=True, slots=True)
class Count:
    """What a count has found, and what had been charged when it was made."""

    found: Amount
    charged: Amount


# --- what is used ---


def open_account(connection: Connection, quota: str) -> None:
    """Have charges of a quota noted from here on; what is used is known once it was counted."""
    row = {"quota": quota, "logical": 0, "stored": 0, "logical_charged": 0, "stored_charged": 0, "counted": 0.0}
    insert_new(connection, quota_accounts, [row])


def used(connection: Connection, quota: str) -> Amount | None:
    """What a quota's repositories use; None where it was never counted."""
    c = quota_accounts.c
    query = sa.select(c.logical + c.logical_charged, c.stored + c.stored_charged)
    query = query.where(c.quota == quota, c.counted > 0)
    row = connection.execute(query).one_or_none()
    return None if row is None else Amount(int(row[0]), int(row[1]))


def charge(connection: Connection, quota: str, amount: Amount) -> None:
    """Add to what a quota uses."""
    c = quota_accounts.c
    connection.execute(
        quota_accounts.update()
        .where(c.quota == quota)
        .values(logical_charged=c.logical_charged + amount.logical, stored_charged=c.stored_charged + amount.stored)
    )


def counted(connection: Connection) -> dict[str, float]:
    """When each quota was counted last."""
    return dict(connection.execute(sa.select(quota_accounts.c.quota, quota_accounts.c.counted)).all())


def set_count(connection: Connection, quota: str, count: Count, now: float) -> None:
    """What a count has found is what is used, together with all that was charged since it was made."""
    base = count.found - count.charged
    values = {"logical": base.logical, "stored": base.stored, "counted": now}
    connection.execute(quota_accounts.update().where(quota_accounts.c.quota == quota).values(values))


# --- reservations ---


def reserved(connection: Connection, quota: str) -> Amount:
    """What is promised under a quota; content that several sessions wait for is stored once."""
    c = quota_reservations.c
    each = sa.select(sa.func.sum(c.logical).label("logical"), sa.func.max(c.stored).label("stored"))
    whose = sa.case((c.key.contains(":"), c.session), else_="")
    keys = each.where(c.quota == quota).group_by(whose, c.key).subquery()
    row = connection.execute(sa.select(sa.func.sum(keys.c.logical), sa.func.sum(keys.c.stored))).one()
    return Amount(int(row[0] or 0), int(row[1] or 0))


def held_by(connection: Connection, session: str, quota: str, keys: Collection[str] | None = None) -> dict[str, Amount]:
    """What a session has reserved under a quota: all, or those of the keys."""
    c = quota_reservations.c
    query = sa.select(c.key, c.logical, c.stored).where(c.session == session, c.quota == quota)
    if keys is None:
        return {key: Amount(logical, stored) for key, logical, stored in connection.execute(query)}
    out = {}
    for batch in batches(sorted(keys)):
        out.update({k: Amount(lg, st) for k, lg, st in connection.execute(query.where(c.key.in_(batch)))})
    return out


def reserve(connection: Connection, session: str, quota: str, wants: Mapping[str, Amount]) -> None:
    """Note what a session, which is under way, may use; an earlier amount for the same key is replaced."""
    release(connection, session, wants.keys(), quota)
    rows = [
        {"session": session, "quota": quota, "key": key, "logical": want.logical, "stored": want.stored}
        for key, want in sorted(wants.items())
    ]
    insert_new(connection, quota_reservations, rows)


def release(connection: Connection, session: str, keys: Iterable[str], quota: str | None = None) -> None:
    """Give reservations of a session back, under one quota or all."""
    c = quota_reservations.c
    where = (c.session == session) if quota is None else (c.session == session) & (c.quota == quota)
    for batch in batches(sorted(set(keys))):
        connection.execute(quota_reservations.delete().where(where, c.key.in_(batch)))


def pay(connection: Connection, session: str, keys: Collection[str]) -> None:
    """Charge stored bytes that were reserved, for these contents by whomever and for what is a session's own, and give
    back what was reserved for them: they are stored, and nobody waits for them any more."""
    c = quota_reservations.c
    own = (c.session == session) & c.key.contains(":")
    _charge(connection, own)
    for batch in batches(sorted(keys)):
        _charge(connection, c.key.in_(batch))


def landed(connection: Connection, key: str) -> None:
    """A content is stored: charge it wherever somebody has reserved it."""
    _charge(connection, quota_reservations.c.key == key)


def _charge(connection: Connection, where: sa.ColumnElement[bool]) -> None:
    """Charge what was reserved, each content once, and give it back."""
    c = quota_reservations.c
    totals: dict[str, int] = {}
    query = sa.select(c.quota, sa.func.max(c.stored)).where(where).group_by(c.quota, c.key)
    for quota, stored_ in connection.execute(query):
        totals[quota] = totals.get(quota, 0) + stored_
    for quota, total in totals.items():
        charge(connection, quota, Amount(0, total))
    if totals:
        connection.execute(quota_reservations.delete().where(where))


# --- counting ---


def all_repositories(connection: Connection) -> list[tuple[int, str, str]]:
    """(number, name, domain) of every repository."""
    r = repositories.c
    query = sa.select(r.id, r.name, r.domain).where(is_there())
    return [(number, name, domain) for number, name, domain in connection.execute(query)]


def waiting_names(connection: Connection) -> list[str]:
    """Repositories for which files were downloaded that no commit holds yet."""
    return list(connection.scalars(sa.select(downloads.c.repository).distinct()))


def charged(connection: Connection, quota: str) -> Amount:
    """All that was charged so far."""
    c = quota_accounts.c
    row = connection.execute(sa.select(c.logical_charged, c.stored_charged).where(c.quota == quota)).one_or_none()
    return Amount() if row is None else Amount(int(row[0]), int(row[1]))


def logical(connection: Connection, numbers: Collection[int]) -> int:
    """Bytes of the commits of repositories, each a full copy."""
    total = 0
    for batch in batches(sorted(numbers)):
        query = sa.select(sa.func.coalesce(sa.func.sum(commits.c.size), 0)).where(commits.c.repository.in_(batch))
        total += int(connection.scalar(query) or 0)
    return total


def stored(connection: Connection, domain: str, numbers: Collection[int], waiting: Collection[str]) -> float:
    """The repositories' share of what the store keeps, as ``inventory.shares`` divides it, and that of files which were
    downloaded for the repositories ``waiting`` (by name) and are held by no commit yet."""
    mine: dict[str, int] = {}
    for batch in batches(sorted(numbers)):
        held = sa.select(repository_blobs.c.sha256).where(repository_blobs.c.repository.in_(batch))
        for sha256 in connection.scalars(held):
            mine[sha256] = mine.get(sha256, 0) + 1
    total = 0.0
    for batch in batches(sorted(mine)):
        each, holders = _shares(connection, domain, batch), _holders(connection, domain, batch)
        total += sum(each.get(sha256, 0.0) * mine[sha256] / holders[sha256] for sha256 in batch if sha256 in holders)
    coming: set[str] = set()
    for batch in batches(sorted(waiting)):
        coming |= set(connection.scalars(sa.select(downloads.c.sha256).where(downloads.c.repository.in_(batch))))
    for batch in batches(sorted(coming - mine.keys())):
        each, holders = _shares(connection, domain, batch), _holders(connection, domain, batch)
        total += sum(each.get(sha256, 0.0) for sha256 in batch if sha256 not in holders)
    return total


def _holders(connection: Connection, domain: str, digests: Collection[str]) -> dict[str, int]:
    query = sa.select(repository_blobs.c.sha256, sa.func.count()).join(
        repositories, repositories.c.id == repository_blobs.c.repository
    )
    query = query.where(repositories.c.domain == domain, repository_blobs.c.sha256.in_(digests))
    return dict(connection.execute(query.group_by(repository_blobs.c.sha256)).all())


def _shares(connection: Connection, domain: str, digests: Collection[str]) -> dict[str, float]:
    """Each blob's part of the objects that it needs: divided among all blobs that need them, by their sizes."""
    b, o = blobs.c, blob_objects.c
    same = (b.domain == o.domain) & (b.sha256 == o.sha256)
    query = sa.select(o.sha256, b.size, o.object, objects.c.size)
    query = query.join_from(blob_objects, blobs, same).join(objects, objects.c.id == o.object)
    rows = connection.execute(query.where(o.domain == domain, o.sha256.in_(digests))).all()
    totals: dict[int, float] = {}
    for batch in batches(sorted({number for _, _, number, _ in rows})):
        weights = sa.select(o.object, sa.func.sum(b.size + 1)).join_from(blob_objects, blobs, same)
        found = connection.execute(weights.where(o.domain == domain, o.object.in_(batch)).group_by(o.object))
        totals.update({number: float(weight) for number, weight in found})
    out: dict[str, float] = {}
    for sha256, size, number, whole in rows:
        out[sha256] = out.get(sha256, 0.0) + whole * (size + 1) / totals[number]
    return out
