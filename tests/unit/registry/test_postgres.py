"""PostgreSQL as the metadata's engine: turns, deadlines, restarts of the server, and what is said when it fails."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from helios.errors import HeliosError, InvalidInput, NoSpace, Unavailable, UsageError
from registry.metadata import postgres
from registry.metadata.database import Database
from registry.metadata.tables import settings
from tests.support.postgres import Server, running


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    with contextlib.closing(Database.postgres(postgres_url)) as opened:
        yield opened


def get(database: Database, name: str) -> str | None:
    with database.read() as connection:
        return connection.scalar(sa.select(settings.c.value).where(settings.c.name == name))


def put(connection: sa.Connection, name: str, value: str) -> None:
    connection.execute(settings.insert().values(name=name, value=value))


def test_a_reader_keeps_its_snapshot_and_waits_for_nobody(database: Database) -> None:
    with database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(settings)) == 1
        with database.write() as writer:
            put(writer, "x", "1")
        assert connection.scalar(sa.select(settings.c.value).where(settings.c.name == "x")) is None
    assert get(database, "x") == "1"


def test_a_reader_can_not_write(database: Database) -> None:
    with pytest.raises(HeliosError, match="read-only"), database.read() as connection:
        put(connection, "x", "1")


def test_writers_of_several_processes_take_turns(postgres_url: str) -> None:
    """Each reads a number and writes the next one: no two may read the same."""
    databases = [Database.postgres(postgres_url) for _ in range(3)]
    with databases[0].write() as connection:
        put(connection, "n", "0")

    def count(database: Database, lazy: bool) -> None:
        for _ in range(20):
            with database.write(lazy=lazy) as connection:
                number = int(connection.scalar(sa.select(settings.c.value).where(settings.c.name == "n")) or 0)
                connection.execute(settings.update().where(settings.c.name == "n").values(value=str(number + 1)))

    threads = [threading.Thread(target=count, args=(d, lazy)) for d in databases for lazy in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert get(databases[0], "n") == str(20 * len(threads))
    for database in databases:
        database.close()


def test_writers_wait_only_so_long(postgres_url: str) -> None:
    with contextlib.closing(Database.postgres(postgres_url, wait_s=0.1)) as database:
        with database.write(), pytest.raises(Unavailable, match="busy"), database.write():
            pass
        with database.write() as connection:  # the turn is free again
            put(connection, "x", "1")
        with pytest.raises(Unavailable, match="busy"), database.read() as connection:
            connection.exec_driver_sql("SELECT pg_sleep(30)")
        assert get(database, "x") == "1"


def test_a_writer_that_stops_in_the_middle_loses_its_turn(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "ABANDONED_S", 0.2)
    with (
        contextlib.closing(Database.postgres(postgres_url)) as stopped,
        contextlib.closing(Database.postgres(postgres_url)) as other,
    ):

        def meanwhile() -> None:
            time.sleep(0.5)
            with other.write() as connection:
                put(connection, "x", "other")

        with pytest.raises(Unavailable):
            _write_around(stopped, meanwhile)
        assert (get(other, "x"), get(other, "y")) == ("other", None)

        assert get(stopped, "x") == "other"  # on a new connection


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["shutdown", "crash"])
def test_a_server_that_restarts_is_found_again(how: signal.Signals) -> None:
    with running() as server, contextlib.closing(Database.postgres(server.url("postgres"))) as database:
        with database.write() as connection:
            put(connection, "x", "1")
        server.stop(how)
        for attempt in (lambda: get(database, "x"), lambda: _write(database)):
            with pytest.raises(Unavailable, match="can't be used"):
                attempt()
        server.start()
        assert get(database, "x") == "1"
        _write(database)
        server.stop(how)  # while connections are idle: nobody needs to notice
        server.start()
        assert get(database, "y") == "1"
        with pytest.raises(Unavailable):
            _write_around(database, lambda: server.stop(how))
        server.start()
        assert get(database, "x") == "1"


def _write_around(database: Database, meanwhile: Callable[[], None]) -> None:
    """A transaction in whose middle something happens."""
    with database.write() as connection:
        connection.execute(settings.delete().where(settings.c.name == "x"))
        put(connection, "x", "around")
        meanwhile()
        put(connection, "y", "around")


def _write(database: Database) -> None:
    with database.write() as connection:
        put(connection, "y", "1")


def test_a_wrong_password_is_said_without_it(postgres_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unavailable) as caught:
        Database.postgres("postgresql://ada:geheim@127.0.0.1:1/helios")
    assert "geheim" not in f"{caught.value} {caught.value.hint} {caplog.text}"
    assert "helios on 127.0.0.1:1" in caught.value.message
    with pytest.raises(Unavailable, match="does not exist"):
        Database.postgres(postgres_server.url("nowhere") + "&password=geheim")


@pytest.mark.parametrize(
    "text",
    ["postgresql:/ada:geheim@db/helios", "mysql://ada:geheim@db/helios", "geheim", "postgresql://ada:geheim@db"],
)
def test_what_is_no_url_of_postgresql_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(UsageError, match=r"registry\.database") as caught:
        Database.postgres(text)
    assert "geheim" not in str(caught.value)


def test_a_server_that_never_answers_costs_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(Unavailable, match="timeout"):
            Database.postgres(f"postgresql://ada@127.0.0.1:{port}/helios?connect_timeout=2")
        assert time.monotonic() - started < 20


def test_texts_that_postgresql_can_not_keep_are_errors_of_ours(database: Database) -> None:
    with pytest.raises(InvalidInput, match="NUL"), database.write() as connection:
        put(connection, "x", "a\0b")
    assert get(database, "x") is None


def test_a_full_disk_is_no_space() -> None:
    import psycopg

    error = sa.exc.OperationalError("INSERT", {}, psycopg.errors.DiskFull("could not extend file"))
    assert isinstance(postgres.Postgres("db").translate(error), NoSpace)
