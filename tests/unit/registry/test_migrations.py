"""Migrations: every older database becomes one of today's, with all it held, and one that isn't known is left alone."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext

from helios.errors import IntegrityError
from helios.names import RepoId
from heliosfs.store.directory import DirectoryStore
from registry.catalog import Catalog
from registry.metadata import claims, migrations, schema
from registry.metadata.database import Database
from registry.metadata.tables import metadata

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "v1" / "metadata.db"
REPO = RepoId.parse("org/name")
FIRST, SECOND = "d375815c8030cf3281bcc9452a72f9aa4d2c0292", "9abf7154c44c4b51c222f9b2944ba54e642246bc"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A database of the first registries: two repositories, three commits, one push that was under way."""
    return Path(shutil.copy(GOLDEN, tmp_path / "metadata.db"))


def test_the_last_step_is_the_one_that_is_opened_without_alembic() -> None:
    assert migrations.steps()[-1] == schema.HEAD


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_the_steps_make_the_tables_that_the_code_works_with(
    old: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    with contextlib.ExitStack() as stack:
        if engine == "sqlite":
            database = Database.sqlite(old)
        else:  # as an administrator who makes the tables by hand, then our migrations
            url = stack.enter_context(request.getfixturevalue("postgres_server").database())
            plain = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
            with plain.connect() as first, first.begin():
                migrations.upgrade(first)
            plain.dispose()
            database = Database.postgres(url)
        stack.callback(database.close)
        connection = stack.enter_context(database.read())
        context = MigrationContext.configure(connection, opts={"target_metadata": metadata, "compare_type": True})
        missing = produce_migrations(context, metadata).upgrade_ops
        assert missing is not None
        assert missing.is_empty(), f"a migration is missing:\n{render_python_code(missing, render_as_batch=True)}"


def test_new_and_migrated_databases_are_the_same(tmp_path: Path, old: Path) -> None:
    Database.sqlite(old).close()
    Database.sqlite(tmp_path / "new.db").close()
    empty = tmp_path / "steps.db"
    with contextlib.closing(sa.create_engine(f"sqlite:///{empty}").connect()) as connection, connection.begin():
        migrations.upgrade(connection)
    assert _definitions(old) == _definitions(tmp_path / "new.db") == _definitions(empty)


def test_an_old_database_keeps_all_it_held(old: Path, tmp_path: Path) -> None:
    before = _rows(old)
    with (
        contextlib.closing(Database.sqlite(old)) as database,
        contextlib.closing(DirectoryStore(tmp_path / "store")) as store,
    ):
        catalog = Catalog(database, store)
        assert catalog.refs(REPO) == {"main": SECOND, "v1.0": FIRST}
        assert [(r.repo.id, r.bytes) for r in catalog.repos()] == [("org/name", 5049), ("squad", 1)]
        assert [record.commit for record in catalog.history(REPO, "main")] == [SECOND, FIRST]
        assert catalog.commit_record(REPO, FIRST).author == "Ada <ada@example.org>"
        with database.read() as connection:
            assert len(claims.unheld(connection)) == 1
    after = _rows(old)
    for table, rows in before.items():
        if table != "settings":
            width = len(rows[0]) if rows else 0  # newer columns are added at the end
            assert [row[:width] for row in after[table]] == rows, table
    assert dict(before["settings"])["owner"] == dict(after["settings"])["owner"]  # type: ignore[call-overload]


def test_the_numbered_schema_does_not_fit_any_more_for_those_who_number(old: Path) -> None:
    Database.sqlite(old).close()
    assert dict(_rows(old)["settings"])["schema"] not in ("", "1")  # type: ignore[call-overload]


def test_a_number_that_is_not_known_is_refused(old: Path) -> None:
    _change(old, "UPDATE settings SET value = '99' WHERE name = 'schema'")
    before = _rows(old)
    with pytest.raises(IntegrityError, match="schema 99"):
        Database.sqlite(old)
    assert _rows(old) == before


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    Database.sqlite(path).close()
    _change(path, "UPDATE alembic_version SET version_num = 'of_next_year'")
    before = _rows(path)
    with pytest.raises(IntegrityError, match="'of_next_year'") as caught:
        Database.sqlite(path)
    assert caught.value.hint is not None
    assert "newer" in caught.value.hint
    assert _rows(path) == before


def test_a_step_that_fails_leaves_the_database_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, definitions = _rows(old), _definitions(old)

    def fail(connection: sa.Connection, to: str = "head") -> None:
        connection.exec_driver_sql("CREATE TABLE half (a INTEGER)")
        connection.exec_driver_sql("DELETE FROM commits")
        raise sa.exc.OperationalError("CREATE", {}, sqlite3.OperationalError("disk I/O error"))

    monkeypatch.setattr(migrations, "upgrade", fail)
    monkeypatch.setattr(schema, "HEAD", "another")
    with pytest.raises(Exception, match="disk I/O error"):
        Database.sqlite(old)
    assert (_rows(old), _definitions(old)) == (before, definitions)


def test_rows_that_lose_what_they_refer_to_undo_the_migration(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _rows(old)

    def careless(connection: sa.Connection, to: str = "head") -> None:
        connection.exec_driver_sql("DELETE FROM repositories")

    monkeypatch.setattr(migrations, "upgrade", careless)
    monkeypatch.setattr(schema, "HEAD", "another")
    with pytest.raises(IntegrityError, match="not there"):
        Database.sqlite(old)
    assert _rows(old) == before


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_several_openers_migrate_once(old: Path, engine: str, request: pytest.FixtureRequest) -> None:
    with contextlib.ExitStack() as stack:
        if engine == "sqlite":
            _open_six(lambda: Database.sqlite(old))
        else:
            url = stack.enter_context(request.getfixturevalue("postgres_server").database())
            _open_six(lambda: Database.postgres(url))


def _open_six(open_: Callable[[], Database]) -> None:
    opened: list[Database] = []
    threads = [threading.Thread(target=lambda: opened.append(open_())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6
    for database in opened:
        with database.read() as connection:
            assert schema.version(connection) == schema.HEAD
            if connection.dialect.name == "sqlite":
                assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        database.close()


def test_a_database_that_is_up_to_date_is_opened_without_alembic(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from registry.metadata.database import Database\n"
        "for _ in range(2): Database.sqlite(pathlib.Path(sys.argv[1])).close()\n"
        "sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "metadata.db"], check=False).returncode == 0


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def _change(path: Path, statement: str) -> None:
    with _plain(path) as connection:
        assert connection.execute(statement).rowcount == 1


def _rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with _plain(path) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr) for name in tables}


def _definitions(path: Path) -> dict[str, object]:
    """What SQLite knows of each table: columns, keys, indexes, and whether it has row ids."""
    with _plain(path) as connection:

        def ask(pragma: str) -> list[tuple[object, ...]]:
            return sorted(connection.execute(f"PRAGMA {pragma}").fetchall(), key=repr)

        def indexes(table: str) -> list[object]:
            found = ask(f"index_list({table})")
            return sorted((row[2:], ask(f"index_info({row[1]})")) for row in found)

        return {
            str(name): (ask(f"table_xinfo({name})"), ask(f"foreign_key_list({name})"), indexes(str(name)), rowid)
            for _, name, kind, _, rowid, _ in ask("table_list")
            if kind == "table"
        }
