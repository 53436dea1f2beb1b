"""Which version of the tables a database has, and how it gets the one that this Helios works with.

The version is the name of the last migration that was applied, in Alembic's own table. A new database is made from the
tables and marked as being at ``HEAD``; an older one is migrated in one transaction; a newer one is refused. Alembic is
imported only where there is something to migrate.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import IntegrityError
from registry.metadata import gc_tables, mirror_tables, quota_tables, sharing_tables, xet  # noqa: F401 - their tables
from registry.metadata.tables import generations, metadata, settings

if TYPE_CHECKING:
    from registry.metadata.database import Database

log = logging.getLogger("helios.registry.metadata")

HEAD: Final = "guard"
"""The last of registry/metadata/migrations/versions."""

_ADOPTED: Final = "first"
"""The migration that stands for databases made before there were any: their setting ``schema`` was 1."""

_MARK: Final = "migrated"
"""Value of that setting since: a Helios that knows numbers only then refuses the database instead of using it."""

_version = sa.Table("alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32), nullable=False))
_version.append_constraint(sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"))


def prepare(database: Database) -> None:
    """Make or migrate the tables where that is needed. Raises IntegrityError for a version that is not known here."""
    with database.read() as connection:
        if version(connection) == HEAD:
            return
    with database.migrate() as connection:
        found = version(connection)  # again, now alone: another process may have been faster
        if found is None and not sa.inspect(connection).has_table(settings.name):
            create(connection)
            return
        if found is None:
            found = _adopt(connection)
        if found != HEAD:
            _upgrade(connection, found)


def version(connection: Connection) -> str | None:
    """The last migration of the database; None where it has none, or no table at all."""
    if not sa.inspect(connection).has_table(_version.name):
        return None
    return connection.scalar(sa.select(_version.c.version_num))


def create(connection: Connection) -> None:
    """Make all tables in an empty database."""
    metadata.create_all(connection)
    connection.execute(settings.insert().values(name="schema", value=_MARK))
    connection.execute(generations.insert(), [{"name": name, "value": 0} for name in ("names", "content")])
    _stamp(connection, HEAD)


def _adopt(connection: Connection) -> str:
    schema = sa.select(settings.c.value).where(settings.c.name == "schema")
    if (found := connection.scalar(schema)) != "1":
        raise _unknown(f"schema {found}")
    connection.execute(settings.update().where(settings.c.name == "schema").values(value=_MARK))
    _stamp(connection, _ADOPTED)
    return _ADOPTED


def _stamp(connection: Connection, step: str) -> None:
    _version.create(connection)
    connection.execute(_version.insert().values(version_num=step))


def _upgrade(connection: Connection, found: str) -> None:
    from registry.metadata import migrations

    if found not in migrations.steps():
        raise _unknown(f"migration {found!r}")
    log.info("migrating the registry's metadata", extra={"since": found, "to": HEAD})
    migrations.upgrade(connection)


def _unknown(what: str) -> IntegrityError:
    return IntegrityError(
        f"the registry's metadata is of another version of Helios: {what}, this one knows {HEAD!r}",
        hint="Run the version of Helios that wrote it or a newer one, or use another database or HELIOS_HOME.",
    )
