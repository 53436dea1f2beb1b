"""The metadata in one SQLite file, which one process uses at a time (the home's lock sees to that).

SQLite runs in WAL mode with synchronous=FULL: a transaction that has committed is on disk when the caller hears of it.
Readers see one snapshot and never wait for the writer; writers take turns on a lock of ours, because SQLite's own
busy handler polls and is not fair.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError

from helios.errors import HeliosError, IntegrityError, NoSpace, Unavailable
from registry.metadata.tables import generations
from registry.metadata.turn import Turn


class Sqlite:
    """See ``database.Kind``."""

    shared = False
    now: sa.ColumnElement[float] = (sa.func.julianday("now", type_=sa.Float) - 2440587.5) * 86400.0

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._writer = Turn()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        if not self._writer.acquire(self._wait_s):
            raise Unavailable(f"the metadata database was busy for {self._wait_s:.0f} s")
        try:
            yield
        finally:
            self._writer.release()

    def held(self, number: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
        return sa.true()  # there are no other processes

    def migrated(self, connection: Connection) -> None:
        if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
            raise IntegrityError(f"after its migration the metadata refers to rows that are not there: {broken[:5]}")

    def generations(self, connection: Connection) -> dict[str, int]:
        return dict(connection.execute(sa.select(generations.c.name, generations.c.value)).all())

    def translate(self, error: DBAPIError) -> HeliosError:
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


def connect(path: Path, wait_s: float) -> tuple[Engine, Sqlite]:
    """An engine for the file, whose directory is made if missing. Raises Unavailable."""
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
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine, Sqlite(wait_s)


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy sends BEGIN itself, through the event below
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "foreign_keys=ON",
        "synchronous=FULL",
        "cache_size=-4096",  # KiB, for each connection
        "journal_size_limit=67108864",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if not options.get("helios_write"):
        connection.exec_driver_sql("BEGIN")
        return
    # Neither pragma does anything inside a transaction. A table is changed by making it anew, so nothing may follow
    # its foreign keys meanwhile; ``migrated`` looks at them at the end.
    connection.exec_driver_sql(f"PRAGMA synchronous={'NORMAL' if options.get('helios_lazy') else 'FULL'}")
    if options.get("helios_migrate"):
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
    # A writer takes its lock at once: a transaction that began reading could not be upgraded under contention.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
