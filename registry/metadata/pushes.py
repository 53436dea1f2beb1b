"""Pushes under way, in SQL, so that whichever process is asked knows them. Every function runs inside a transaction."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from heliosfs.store.manifest import FileEntry
from registry.metadata.database import batches
from registry.metadata.tables import push_files, pushes


@dataclass(frozen=True, slots=True)
class PushRow:
    """A push; ``base`` is where the ref pointed at its start, ``used`` when a call was last seen."""

    id: str
    session: str
    repository: str
    ref: str
    message: str
    author: str
    base: str | None
    used: float


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file that a push announced; ``entry`` and ``new_bytes`` once it is stored."""

    path: str
    size: int
    executable: bool
    entry: FileEntry | None
    new_bytes: int


_PUSH = tuple(pushes.c[name] for name in PushRow.__dataclass_fields__)


def add(connection: Connection, push: PushRow, files: Iterable[tuple[str, int, bool]]) -> None:
    """Add a push, whose session is there, with its files: (path, size, executable)."""
    connection.execute(pushes.insert().values({name: getattr(push, name) for name in PushRow.__dataclass_fields__}))
    rows = [{"push": push.id, "path": path, "size": size, "executable": mode} for path, size, mode in files]
    for batch in batches(rows):
        connection.execute(push_files.insert(), list(batch))


def find(connection: Connection, id_: str) -> PushRow | None:
    """A push that is under way, or None."""
    row = connection.execute(sa.select(*_PUSH).where(pushes.c.id == id_)).one_or_none()
    return None if row is None else PushRow(*row)


def under_way(connection: Connection, ids: Collection[str] | None = None) -> set[str]:
    """Those of the pushes (None: of all) that are under way."""
    if ids is None:
        return set(connection.scalars(sa.select(pushes.c.id)))
    found: set[str] = set()
    for batch in batches(sorted(ids)):
        found |= set(connection.scalars(sa.select(pushes.c.id).where(pushes.c.id.in_(batch))))
    return found


def count(connection: Connection) -> int:
    """How many pushes are under way."""
    return connection.scalar(sa.select(sa.func.count()).select_from(pushes)) or 0


def sessions(connection: Connection) -> list[str]:
    """The sessions of all pushes."""
    return list(connection.scalars(sa.select(pushes.c.session)))


def idle(connection: Connection, before: float) -> list[PushRow]:
    """Pushes that nobody has used since then."""
    return [PushRow(*row) for row in connection.execute(sa.select(*_PUSH).where(pushes.c.used < before))]


def touch(connection: Connection, ids: Collection[str], now: float) -> None:
    """Note that pushes are in use."""
    for batch in batches(sorted(ids)):
        connection.execute(pushes.update().where(pushes.c.id.in_(batch), pushes.c.used < now).values(used=now))


def files(connection: Connection, id_: str, path: str | None = None) -> list[FileRow]:
    """The files of a push, or the one at the path if it was announced."""
    query = sa.select(push_files).where(push_files.c.push == id_).order_by(push_files.c.path)
    if path is not None:
        query = query.where(push_files.c.path == path)
    return [_file(row) for row in connection.execute(query)]


def progress(connection: Connection, id_: str) -> tuple[int, int]:
    """How many files of a push are stored, and their bytes."""
    stored = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(push_files.c.size), 0))
    row = connection.execute(stored.where(push_files.c.push == id_, push_files.c.sha256.is_not(None))).one()
    return int(row[0]), int(row[1])


def store(connection: Connection, id_: str, path: str, entry: FileEntry, new_bytes: int) -> bool:
    """Note that a file is stored; returns whether the push is still under way."""
    values = {
        "sha256": entry.sha256,
        "git_oid": entry.git_oid,
        "recipe": entry.recipe,
        "lfs": entry.lfs,
        "new_bytes": _more(new_bytes),
    }
    return _update(connection, id_, path, values)


def add_new(connection: Connection, id_: str, path: str, new_bytes: int) -> bool:
    """Count bytes of a file that is not stored yet; returns whether the push is still under way."""
    return _update(connection, id_, path, {"new_bytes": _more(new_bytes)})


def sent(connection: Connection, id_: str) -> dict[str, str]:
    """Blobs of the push's files that are stored: sha256 -> recipe."""
    query = sa.select(push_files.c.sha256, push_files.c.recipe)
    return dict(connection.execute(query.where(push_files.c.push == id_, push_files.c.sha256.is_not(None))).all())


def _more(new_bytes: int) -> sa.ColumnElement[int]:
    """What was new of a file so far and so many bytes besides: a file that is sent again was new the first time."""
    total = sa.func.coalesce(push_files.c.new_bytes, 0) + new_bytes
    return sa.case((total > push_files.c.size, push_files.c.size), else_=total)


def _update(connection: Connection, id_: str, path: str, values: Mapping[str, object]) -> bool:
    where = (push_files.c.push == id_) & (push_files.c.path == path)
    return connection.execute(push_files.update().where(where).values(values)).rowcount == 1


def _file(row: sa.Row[tuple[object, ...]]) -> FileRow:
    entry = None
    if row.sha256 is not None:
        entry = FileEntry(row.sha256, row.size, row.git_oid, row.recipe, row.lfs, row.executable)
    return FileRow(row.path, row.size, row.executable, entry, row.new_bytes or 0)
