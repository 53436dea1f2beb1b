"""The metadata in a database of a PostgreSQL server, which several registry processes may share.

Reads are REPEATABLE READ and READ ONLY: one snapshot, and nothing that the server would ever have to undo. Writes take
turns on one advisory lock, their first statement, which the server gives back with the transaction, however that ends.
After it each statement sees all that is committed (READ COMMITTED), and as nobody else writes, that is one state: the
strength of SERIALIZABLE without its retries, and there are no two writers for a deadlock.
"""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from helios.errors import HeliosError, IntegrityError, InvalidInput, NoSpace, Unavailable, UsageError

WRITER: Final = 0x48454C494F53
"""The advisory lock of writers: "HELIOS". A database is one registry's, so nobody else has a use for it."""

ABANDONED_S: Final = 60
"""A transaction whose process sends nothing for this long is undone by the server, and its turn ends."""

MIGRATION_S: Final = 1800
"""Longest statement of a migration, and the longest wait of a process that starts meanwhile."""

_OPTIONS: Final[dict[str, object]] = {
    "autocommit": True,  # transactions begin with a statement of ours
    "application_name": "helios-registry",
    # Whoever is silent behind a dead network is found out. Seconds, and milliseconds for what isn't acknowledged.
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""Of each connection, unless the URL says otherwise."""

_COUNT: Final = {
    "names": "UPDATE generations SET value = value + 1 WHERE name = 'names'",
    "content": "UPDATE generations SET value = value + 1 WHERE name = 'content'",
}

_LOCKS: Final = sa.table(
    "pg_locks",
    sa.column("locktype", sa.String),
    sa.column("database", sa.BigInteger),
    sa.column("classid", sa.BigInteger),
    sa.column("objid", sa.BigInteger),
    sa.column("objsubid", sa.Integer),
    sa.column("granted", sa.Boolean),
)
_DATABASES: Final = sa.table("pg_database", sa.column("oid", sa.BigInteger), sa.column("datname", sa.String))

_SETUP = "postgresql://user@host:5432/name in registry.database"


class Postgres:
    """See ``database.Kind``."""

    shared = True
    now: sa.ColumnElement[float] = sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)

    def __init__(self, where: str) -> None:
        self._where = where

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # the server's lock is for all processes, this one among them

    def held(self, number: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
        c = _LOCKS.c
        here = sa.select(_DATABASES.c.oid).where(_DATABASES.c.datname == sa.func.current_database()).scalar_subquery()
        high, low = sa.cast(c.classid, sa.BigInteger), sa.cast(c.objid, sa.BigInteger)
        lock = sa.select(c.objid).where(c.locktype == "advisory", c.objsubid == 1, c.granted, c.database == here)
        return lock.where(high == number // (1 << 32), low == sa.func.mod(number, 1 << 32)).exists()

    def migrated(self, connection: Connection) -> None:
        """Nothing: the server checks foreign keys itself."""

    def generations(self, connection: Connection) -> dict[str, int]:
        import psycopg

        raw: Any = connection.connection.dbapi_connection
        statement = "SELECT name, value FROM generations"
        try:
            return dict(raw.execute(statement).fetchall())
        except psycopg.Error as error:
            if raw.closed:
                connection.exec_driver_sql(statement)
            raise DBAPIError.instance(statement, None, error, psycopg.Error, dialect=connection.dialect) from error

    def translate(self, error: DBAPIError) -> HeliosError:
        code = str(getattr(error.orig, "sqlstate", None) or "")
        text = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
        said = f"{text} ({code or 'no code'})"
        if not code and "NUL (0x00)" in text:  # psycopg's word for it, before the server is asked
            return InvalidInput("a name or a text holds a NUL character, which the registry's database can't keep")
        if code == "53100":
            return NoSpace(f"the disk of the metadata database ({self._where}) is full: {said}")
        if code.startswith("XX"):
            return IntegrityError(
                f"the metadata database ({self._where}) is damaged: {said}", hint="Look at the PostgreSQL server's log."
            )
        if code in _BUSY:
            return Unavailable(f"the metadata database ({self._where}) was busy for too long: {said}")
        if error.connection_invalidated or code[:2] in _AWAY or (not code and _is_operational(error)):
            return Unavailable(
                f"the metadata database ({self._where}) can't be used: {said}",
                hint="Look whether the PostgreSQL server runs, and at registry.database, PGPASSWORD or PGPASSFILE.",
            )
        return HeliosError(f"the metadata database ({self._where}) refused a statement: {said}")


_BUSY = frozenset({"55P03", "57014", "40001", "40P01", "25P03"})
"""No lock or no end in time; what a server may undo because of a stranger in the database; an abandoned transaction."""

_AWAY = frozenset({"08", "28", "3D", "53", "57", "58"})
"""No connection, no entry, no such database, no resources, shutting down, an error of the system."""


def connect(url: str, wait_s: float) -> tuple[Engine, Postgres]:
    """An engine for the server, which isn't asked yet."""
    parsed = _parse(url)
    if find_spec("psycopg") is None:
        raise UsageError(
            "registry.database needs psycopg, which is not installed", hint="pip install 'helios-llm[postgres]'"
        )
    engine = sa.create_engine(
        parsed,
        connect_args={name: value for name, value in _OPTIONS.items() if name not in parsed.query},
        pool_size=4,
        max_overflow=12,
        pool_timeout=wait_s,
        pool_use_lifo=True,
    )
    wait_ms = max(1, int(wait_s * 1000))
    event.listen(engine, "connect", lambda connection, _record: _prepare(connection, wait_ms))
    event.listen(engine, "begin", _begin)
    return engine, Postgres(_describe(parsed))


def _parse(text: str) -> URL:
    # What is wrong with it isn't repeated: there may be a password in it.
    try:
        url = make_url(text)
    except ArgumentError:
        raise UsageError(f"registry.database is not a URL; write {_SETUP}") from None
    if url.get_backend_name() not in ("postgresql", "postgres") or not url.database:
        raise UsageError(f"registry.database does not name a database of PostgreSQL; write {_SETUP}")
    return url.set(drivername="postgresql+psycopg")


def _describe(url: URL) -> str:
    """The URL as people may see it: where, without user, password and options."""
    host = url.host or url.query.get("host", "local socket")
    return f"{url.database} on {host}" + (f":{url.port}" if url.port else "")


def _prepare(connection: Any, wait_ms: int) -> None:
    connection.execute(
        f"SET statement_timeout = {wait_ms}; SET lock_timeout = {wait_ms}; "
        f"SET idle_in_transaction_session_timeout = {ABANDONED_S * 1000}"
    )


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get("helios_single"):
        return
    if not options.get("helios_write"):
        _send(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return
    parts = ["BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"]
    if options.get("helios_lazy"):
        parts.append("SET LOCAL synchronous_commit = off")
    if options.get("helios_migrate"):
        limit = MIGRATION_S * 1000
        parts.append(f"SET LOCAL statement_timeout = {limit}; SET LOCAL lock_timeout = {limit}")
    parts.append(f"SELECT pg_advisory_xact_lock({WRITER})")
    # Before the changes themselves, so that it costs no message of its own; all of them are seen at once.
    parts += [_COUNT[name] for name in options.get("helios_changes", ())]
    _send(connection, "; ".join(parts))


def _send(connection: Connection, statements: str) -> None:
    """Statements in one message, which only a query without parameters may be, and past SQLAlchemy, which would cost
    more than the server does."""
    import psycopg

    raw: Any = connection.connection.dbapi_connection
    try:
        raw.execute(statements)
    except psycopg.Error as error:
        if raw.closed:  # SQLAlchemy sees so itself, and drops whatever else was connected to the same server
            connection.exec_driver_sql(statements, execution_options={"no_parameters": True})
        raise DBAPIError.instance(statements, None, error, psycopg.Error, dialect=connection.dialect) from error


def _is_operational(error: DBAPIError) -> bool:
    return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)
