"""Files that are kept back, and who signed which commit. Every function runs inside a transaction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import NotFound
from registry.metadata.database import insert_new
from registry.metadata.repositories import Repository
from registry.metadata.tables import is_there, quarantine, repositories, signatures


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that is or was kept back; times in unix seconds."""

    repo: str
    path: str
    sha256: str
    findings: str
    since: int
    released: int | None
    released_by: str | None


def hold(connection: Connection, repository: Repository, files: Iterable[tuple[str, str, str]], now: int) -> None:
    """Keep back files by (path, sha256, findings). What was kept back, or released, before stays as it is."""
    rows = [
        {"repository": repository.id, "sha256": sha256, "path": path, "findings": findings, "since": now}
        for path, sha256, findings in files
    ]
    insert_new(connection, quarantine, rows)


def is_held(connection: Connection, repository: Repository, sha256: str) -> str | None:
    """The findings on a blob of the repository that is kept back, or None."""
    c = quarantine.c
    where = (c.repository == repository.id) & (c.sha256 == sha256) & c.released.is_(None)
    return connection.scalar(sa.select(c.findings).where(where))


def listing(connection: Connection, repository: Repository | None, *, released: bool) -> list[Kept]:
    """What is kept back, and what was where ``released`` is set; by repository and path."""
    c = quarantine.c
    query = (
        sa.select(repositories.c.name, c.path, c.sha256, c.findings, c.since, c.released, c.released_by)
        .join_from(quarantine, repositories, c.repository == repositories.c.id)
        .where(is_there())
        .order_by(repositories.c.name, c.path, c.sha256)
    )
    if repository is not None:
        query = query.where(c.repository == repository.id)
    if not released:
        query = query.where(c.released.is_(None))
    return [Kept(*row) for row in connection.execute(query)]


def release(connection: Connection, repository: Repository, sha256: str, by: str, now: int) -> None:
    """Let a blob go. Raises NotFound when it is not kept back in the repository."""
    c = quarantine.c
    where = (c.repository == repository.id) & (c.sha256 == sha256) & c.released.is_(None)
    done = connection.execute(quarantine.update().where(where).values(released=now, released_by=by))
    if not done.rowcount:
        raise NotFound(f"{repository.name} has no file with sha256 {sha256} that is kept back")


def sign(connection: Connection, repository: Repository, commit: str, signer: str, now: int) -> None:
    """Note who signed a commit."""
    insert_new(
        connection, signatures, [{"repository": repository.id, "commit": commit, "signer": signer, "checked": now}]
    )


def signer(connection: Connection, repository: Repository, commit: str) -> str | None:
    """Who signed a commit, or None where that was not checked."""
    c = signatures.c
    return connection.scalar(sa.select(c.signer).where(c.repository == repository.id, c.commit == commit))
