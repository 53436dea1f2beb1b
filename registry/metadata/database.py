"""The connection to the metadata database, and what differs between SQL dialects.

SQLite runs in WAL mode with synchronous=FULL: a transaction that has committed is on disk when the caller hears of it.
Readers see one snapshot and never wait for the writer; writers take turns on a lock of ours, because SQLite's own
busy handler polls and is not fair.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError

from helios.errors import HeliosError, IntegrityError, NoSpace, Unavailable
from registry.metadata.schema import prepare

BATCH = 500
"""Most values in one IN list or rows in one INSERT: far below every engine's limit on bound parameters."""


class Database:
    """Transactions on the metadata. Threads may share one."""

    def __init__(self, engine: Engine, *, wait_s: float = 30.0) -> None:
        self.engine = engine
        self._wait_s = wait_s
        self._writer = threading.Lock()

    @classmethod
    def sqlite(cls, path: Path, *, wait_s: float = 30.0) -> Database:
        """Open, and make where there is none, the database in one file.

        Raises Unavailable when the file can't be used, IntegrityError when it is damaged or of another version.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"{path.parent} can't be made: {error.strerror}") from None
        engine = sa.create_engine(
            URL.create("sqlite", database=str(path)),
            connect_args={"timeout": wait_s, "check_same_thread": False},
            pool_size=8,
            max_overflow=24,
            pool_timeout=wait_s,
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        database = cls(engine, wait_s=wait_s)
        try:
            prepare(database)
        except BaseException:
            database.close()
            raise
        return database

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A read-only transaction: one consistent snapshot."""
        with self._errors(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A writing transaction, alone in this process; durable when the context has been left without an error."""
        with self._turn(), self._errors(), self.engine.connect() as plain:
            connection = plain.execution_options(helios_write=True)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def migrate(self) -> Iterator[Connection]:
        """A writing transaction in which tables may be changed.

        SQLite changes a table by making it anew, so nothing may follow its foreign keys meanwhile; they are checked
        at the end. Raises IntegrityError when one leads nowhere.
        """
        with self._turn(), self._errors(), self.engine.connect() as plain:
            connection = plain.execution_options(helios_write=True, helios_migrate=True)
            with connection.begin():
                yield connection
                if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
                    raise IntegrityError(
                        f"after its migration the metadata refers to rows that are not there: {broken[:5]}"
                    )
            plain.invalidate()  # its foreign keys are off

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._writer.acquire(timeout=self._wait_s):
            raise Unavailable(f"the metadata database was busy for {self._wait_s:.0f} s")
        try:
            yield
        finally:
            self._writer.release()

    def close(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise translate(error) from error
        except sa.exc.TimeoutError:
            raise Unavailable(f"no connection to the metadata database was free for {self._wait_s:.0f} s") from None


def insert_new(connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows; those whose key is there already are left as they are."""
    # Each dialect has an INSERT of its own with this clause; a module is imported only where it is used.
    make: Any = import_module(f"sqlalchemy.dialects.{connection.dialect.name}").insert
    for batch in batches(rows):
        connection.execute(make(table).on_conflict_do_nothing(), list(batch))


def batches(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The values in slices that fit one statement."""
    for start in range(0, len(values), BATCH):
        yield values[start : start + BATCH]


def translate(error: DBAPIError) -> HeliosError:
    """The error a person should see for a failure of the database."""
    name = str(getattr(error.orig, "sqlite_errorname", ""))
    if name == "SQLITE_FULL":
        return NoSpace(
            "the disk of the registry's metadata is full", hint="Free some space under HELIOS_HOME and try again."
        )
    if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
        return IntegrityError(
            f"the registry's metadata database is damaged: {error.orig}",
            hint="Restore $HELIOS_HOME/registry/metadata.db from a copy, or move it away and publish again.",
        )
    if isinstance(error.orig, sqlite3.OperationalError):
        return Unavailable(f"the registry's metadata database can't be used: {error.orig} ({name or 'no code'})")
    return HeliosError(f"the registry's metadata database refused a statement: {error.orig}")


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy sends BEGIN itself, through the event below
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "cache_size=-4096",  # KiB, for each connection
        "journal_size_limit=67108864",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock at once: a transaction that began reading could not be upgraded under contention.
    options = connection.get_execution_options()
    if options.get("helios_migrate"):
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")  # says nothing inside a transaction
    connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("helios_write") else "BEGIN")
