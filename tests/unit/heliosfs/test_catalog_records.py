"""What the catalog keeps on disk."""

import sqlite3

from helios.names import RepoId
from heliosfs.records import Records, SeenCommit

REPO = RepoId.parse("org/name")
C1 = "1" * 40


def test_a_damaged_file_is_started_anew(tmp_path, caplog):
    path = tmp_path / "catalog.db"
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    records = Records(path)
    records.add_commit(SeenCommit(REPO, C1, "0" * 64, 1))
    assert [c.commit for c in records.load().commits] == [C1]
    records.close()
    assert "damaged" in caplog.text


def test_a_file_of_a_newer_version_is_started_anew(tmp_path):
    path = tmp_path / "catalog.db"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    records = Records(path)
    assert records.load().refs == {}
    records.close()


def test_a_disk_that_takes_nothing_costs_one_warning(tmp_path, caplog):
    records = Records(tmp_path / "catalog.db")
    records._db.execute("PRAGMA query_only = 1")
    for _ in range(3):
        records.set_refs({REPO: {"main": C1}})
    assert records.load().refs == {}
    records.close()
    assert caplog.text.count("can't be kept") == 1


def test_only_so_many_commits_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("heliosfs.records.MAX_COMMITS", 3)
    records = Records(tmp_path / "catalog.db")
    for number in range(6):
        digest = f"{number:064x}"
        records.add_commit(SeenCommit(REPO, f"{number:040x}", digest, 1))
        records.add_manifest(digest, b"x")
    assert [int(c.commit, 16) for c in records.load().commits] == [3, 4, 5]
    assert records.manifest(f"{0:064x}") is None
    assert records.manifest(f"{5:064x}") == b"x"
    records.close()
