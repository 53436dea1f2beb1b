"""The metadata database: versions, damage, errors, durability settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from helios.errors import IntegrityError, NoSpace, Unavailable
from registry.metadata.database import Database
from registry.metadata.tables import settings


def test_durable_and_concurrent(tmp_path: Path) -> None:
    database = Database.sqlite(tmp_path / "a" / "metadata.db")
    with database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.scalar(sa.select(sa.func.count()).select_from(settings)) == 1
        with database.write() as writer:  # a reader's snapshot neither blocks nor sees a writer
            writer.execute(settings.insert().values(name="x", value="1"))
        assert connection.scalar(sa.select(settings.c.value).where(settings.c.name == "x")) is None
    database.close()


def test_an_error_inside_a_transaction_undoes_it(tmp_path: Path) -> None:
    database = Database.sqlite(tmp_path / "metadata.db")
    with pytest.raises(IntegrityError), database.write() as connection:
        _write_then_fail(connection)
    with database.read() as connection:
        assert connection.scalar(sa.select(settings.c.value).where(settings.c.name == "x")) is None
    database.close()


def test_damage_is_said(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    path.write_bytes(b"this is not a database" * 1000)
    with pytest.raises(IntegrityError, match="damaged"):
        Database.sqlite(path)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "registry").write_text("a file")
    with pytest.raises(Unavailable, match="can't be made"):
        Database.sqlite(tmp_path / "registry" / "metadata.db")


def test_a_full_disk_is_no_space(tmp_path: Path) -> None:
    database = Database.sqlite(tmp_path / "metadata.db")
    with database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")  # SQLite then answers as on a full disk
    with pytest.raises(NoSpace), database.write() as connection:
        _write_much(connection)
    database.close()


def test_writers_wait_only_so_long(tmp_path: Path) -> None:
    database = Database.sqlite(tmp_path / "metadata.db", wait_s=0.05)
    with database.write(), pytest.raises(Unavailable, match="busy"), database.write():
        pass
    database.close()


def _write_then_fail(connection: sa.Connection) -> None:
    connection.execute(settings.insert().values(name="x", value="1"))
    raise IntegrityError("something was wrong")


def _write_much(connection: sa.Connection) -> None:
    connection.execute(settings.insert().values(name="big", value="x" * 1_000_000))
