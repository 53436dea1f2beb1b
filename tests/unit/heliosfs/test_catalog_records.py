"""What the catalog keeps on disk."""

import random
import shutil
import sqlite3

import pytest

from helios.names import RepoId
from heliosfs.records import Records, SeenCommit
from tests.support.disks import fill_up, remount, small_disk

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


def some_records(path):
    """A file that was closed, beside one whose log is not moved yet."""
    records = Records(path / "catalog.db")
    records.set_refs({REPO: {"main": C1, "v1": "2" * 40}})
    for number in range(50):
        records.add_commit(SeenCommit(REPO, f"{number:040x}", f"{number:064x}", number))
        records.add_manifest(f"{number:064x}", b"x" * 3000)
    return records


def test_whatever_is_left_of_the_file_it_can_be_used(tmp_path):
    """A power cut on a bad disk: parts are missing, zero or garbage. SQLite looks at a page only when it needs it."""
    records = some_records(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "open")
    records.close()
    shutil.copytree(tmp_path, tmp_path / "closed", ignore=shutil.ignore_patterns("open"))
    for seed in range(120):
        rng = random.Random(seed)
        root = shutil.copytree(tmp_path / rng.choice(["open", "closed"]), tmp_path / f"torn-{seed}")
        for path in root.iterdir():
            data = bytearray(path.read_bytes())
            at = rng.randrange(len(data)) & ~511
            damage = rng.choice(["none", "short", "hole", "zeros", "garbage", "gone"])
            if damage == "short":
                del data[rng.randrange(len(data)) :]
            elif damage == "hole":
                data[at : at + 4096] = bytes(len(data[at : at + 4096]))
            elif damage == "zeros":
                data[at:] = bytes(len(data[at:]))
            elif damage == "garbage":
                data[at : at + 300] = rng.randbytes(len(data[at : at + 300]))
            path.write_bytes(data)
            if damage == "gone":
                path.unlink()
        records = Records(root / "catalog.db")
        records.load()
        assert records.manifest(f"{3:064x}") in (None, b"x" * 3000)
        records.add_commit(SeenCommit(REPO, "e" * 40, "f" * 64, 5))
        records.close()
        shutil.rmtree(root)


@pytest.fixture
def disk(tmp_path):
    """A real file system of 3 MiB."""
    with small_disk(tmp_path / "disk", 3) as path:
        yield path


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_takes_nothing_is_no_reason_not_to_start(disk, caplog, trouble):
    some_records(disk).close()
    (disk / "new").mkdir()
    if trouble == "full":
        fill_up(disk)
    else:
        remount(disk, "ro")
    for root, commits in ((disk, 50), (disk / "new", 0)):
        records = Records(root / "catalog.db")
        assert len(records.load().commits) == commits, "what is there is kept"
        records.add_commit(SeenCommit(REPO, "e" * 40, "f" * 64, 5))
        records.close()
    assert caplog.text.count("can't be kept") == 2
    if trouble == "full":
        (disk / "others").unlink()
    else:
        remount(disk, "rw")
    records = Records(disk / "catalog.db")
    records.add_commit(SeenCommit(REPO, "e" * 40, "f" * 64, 5))
    assert len(records.load().commits) == 51
    records.close()
