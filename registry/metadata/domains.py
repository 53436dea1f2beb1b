"""What lies in each domain. Every function runs inside a transaction."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata import content
from registry.metadata.tables import blobs, claims, doomed, objects, repositories


@dataclass(frozen=True, slots=True)
class DomainUsage:
    """A domain's bytes; ``waiting`` objects are deleted when nobody can know of them any more, at ``until`` at the
    latest (seconds of the database's clock; 0: none wait)."""

    domain: str
    repositories: int
    unique: int
    stored: int
    waiting: int
    until: float


def usage(connection: Connection, domain: str) -> DomainUsage:
    """What a domain holds."""
    count = sa.select(sa.func.count()).select_from(repositories).where(repositories.c.domain == domain)
    waits = sa.select(sa.func.count(), sa.func.max(doomed.c.not_before)).where(_below(doomed.c.key, domain))
    waiting, until = connection.execute(waits).one()
    return DomainUsage(
        domain,
        connection.scalar(count) or 0,
        content.held_bytes(connection, domain),
        content.stored_bytes(connection, domain),
        waiting,
        float(until or 0),
    )


def lie_in(connection: Connection, domain: str) -> list[str]:
    """Names of the repositories that lie in a domain."""
    query = sa.select(repositories.c.name).where(repositories.c.domain == domain)
    return list(connection.scalars(query.order_by(repositories.c.name)))


def blobs_in(connection: Connection, domain: str, after: str, limit: int) -> list[str]:
    """At most so many of the domain's blobs, from the one that follows ``after``."""
    query = sa.select(blobs.c.sha256).where(blobs.c.domain == domain, blobs.c.sha256 > after)
    return list(connection.scalars(query.order_by(blobs.c.sha256).limit(limit)))


def left_in(connection: Connection, domain: str) -> tuple[int, int]:
    """How many objects of a domain have rows still, and how many claims there are on its objects and blobs."""
    rows = sa.select(sa.func.count()).select_from(objects).where(objects.c.domain == domain)
    mine = sa.or_(_below(claims.c.key, domain), claims.c.key.startswith(f"{domain}:", autoescape=True))
    held = sa.select(sa.func.count()).select_from(claims).where(mine)
    return connection.scalar(rows) or 0, connection.scalar(held) or 0


def _below(key: sa.Column[str], domain: str) -> sa.ColumnElement[bool]:
    return key.startswith(f"{domain}/", autoescape=True)
