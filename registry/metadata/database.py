"""Transactions on the metadata, whatever engine keeps it.

Writers take turns, in one process and among all that share a database: a writing transaction sees all that the ones
before it did and nobody changes anything beside it. So what a transaction has read stays true until it ends, and no
engine ever has to undo one because of another. What differs between engines is in ``sqlite`` and ``postgres``.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RootTransaction
from sqlalchemy.exc import DBAPIError

from helios.errors import HeliosError, IntegrityError, Unavailable
from registry.metadata.schema import prepare

BATCH: Final = 500
"""Most values in one IN list or rows in one INSERT: far below every engine's limit on bound parameters."""

WAIT_S: Final = 30.0
"""Longest wait for a writer's turn, for a connection and for a statement, in seconds."""


class Changes(enum.Enum):
    """What a writing transaction may change of that which readers keep in memory: the generations it counts up."""

    ALL = ("names", "content")
    NAMES = ("names",)
    """Repositories, refs and commits; not where the bytes of a blob lie."""
    NOTHING = ()


class Kind(Protocol):
    """What an engine does in its own way. It begins transactions as their connection's options say.

    ``helios_write``: a writing one, in its turn; ``helios_lazy``: it need not be on disk when it is committed;
    ``helios_migrate``: tables may be changed; ``helios_changes``: which ``generations`` it counts up, where other
    processes look at them; ``helios_single``: one statement follows, which needs no transaction.
    """

    shared: bool
    """Whether other processes may use the database at the same time."""

    now: sa.ColumnElement[float]
    """The database's clock, in seconds since 1970 UTC: one for all processes, whatever their machines' clocks say."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """The writers' turn inside this process, taken before a connection."""

    def held(self, number: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
        """Whether a process holds the number (registry/metadata/guard.py)."""

    def migrated(self, connection: Connection) -> None:
        """Look at a database before a migration of it is committed; raises IntegrityError."""

    def generations(self, connection: Connection) -> dict[str, int]:
        """Every row of the table: asked for each request where processes share the database."""

    def translate(self, error: DBAPIError) -> HeliosError:
        """The error a person should see for a failure of the database."""


class Database:
    """Transactions on the metadata. Threads may share one."""

    def __init__(self, engine: Engine, kind: Kind) -> None:
        self.engine, self.kind = engine, kind
        self._watchers: list[Callable[[Changes], None]] = []
        try:
            prepare(self)
        except BaseException:
            self.close()
            raise

    @classmethod
    def sqlite(cls, path: Path, *, wait_s: float = WAIT_S) -> Database:
        """Open, and make where there is none, the database in one file, which one process uses at a time.

        Raises Unavailable when the file can't be used, IntegrityError when it is damaged or of another version.
        """
        from registry.metadata import sqlite

        return cls(*sqlite.connect(path, wait_s))

    @classmethod
    def postgres(cls, url: str, *, wait_s: float = WAIT_S) -> Database:
        """Open a database of a PostgreSQL server, ``postgresql://user@host:port/name``; its tables are made if missing.

        Raises UsageError for what is no such URL, Unavailable when the server can't be used, IntegrityError when the
        tables are of another version.
        """
        from registry.metadata import postgres

        return cls(*postgres.connect(url, wait_s))

    @contextlib.contextmanager
    def read(self, *, single: bool = False) -> Iterator[Connection]:
        """A read-only transaction: one consistent snapshot. It never waits for writers.

        With ``single`` there is one statement, which is a snapshot by itself: less to say to a server.
        """
        with self.errors(), self._transaction({"helios_single": single}) as connection:
            yield connection

    @contextlib.contextmanager
    def write(self, *, lazy: bool = False, changes: Changes = Changes.ALL) -> Iterator[Connection]:
        """A writing transaction, alone among all that use the database.

        It is on disk when the context has been left without an error; with ``lazy`` it is only seen by everybody then,
        and a crash of the machine may undo it: for what means nothing after one. By then whoever watches in this
        process has been told what it changed, and other processes see it by ``generations``.
        """
        options = {"helios_write": True, "helios_lazy": lazy, "helios_changes": changes.value}
        try:
            with self.errors(), self.kind.turn(), self._transaction(options) as connection:
                yield connection
        finally:  # a commit whose outcome got lost may have come about
            if changes is not Changes.NOTHING:
                for watcher in self._watchers:
                    watcher(changes)

    def watch(self, watcher: Callable[[Changes], None]) -> None:
        """Call ``watcher`` after every write of this process that changes something, before it is acknowledged."""
        self._watchers.append(watcher)

    def generations(self) -> dict[str, int]:
        """How many changes of each kind were committed. What is read after this is at least as new."""
        try:
            found = self._generations()
        except Unavailable:  # the connection had died; a new one tells whether the server has
            found = self._generations()
        if found.keys() != set(Changes.ALL.value):
            raise IntegrityError("the metadata does not count its changes: rows of the table `generations` are missing")
        return found

    def _generations(self) -> dict[str, int]:
        with self.read(single=True) as connection:
            return self.kind.generations(connection)

    @contextlib.contextmanager
    def migrate(self) -> Iterator[Connection]:
        """A writing transaction in which tables may be changed. Raises IntegrityError for rows that don't fit then."""
        options = {"helios_write": True, "helios_migrate": True}
        with self.errors(), self.kind.turn(), self._transaction(options, discard=True) as connection:
            yield connection
            self.kind.migrated(connection)

    def close(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def _transaction(self, options: Mapping[str, Any], *, discard: bool = False) -> Iterator[Connection]:
        connection, transaction = self._begin(options)
        with connection:
            with transaction:
                yield connection
            if discard:
                connection.invalidate()

    def _begin(self, options: Mapping[str, Any]) -> tuple[Connection, RootTransaction]:
        """Begin a transaction, on a new connection where an idle one has died: the server may have restarted."""
        try:
            return self._begin_once(options)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
        return self._begin_once(options)

    def _begin_once(self, options: Mapping[str, Any]) -> tuple[Connection, RootTransaction]:
        connection = self.engine.connect()
        try:
            connection = connection.execution_options(**options)
            return connection, connection.begin()
        except BaseException:
            connection.close()
            raise

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise what a person should see for a failure of the database."""
        try:
            yield
        except DBAPIError as error:
            raise self.kind.translate(error) from error
        except sa.exc.TimeoutError:
            raise Unavailable("no connection to the metadata database was free in time; try again later") from None


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
