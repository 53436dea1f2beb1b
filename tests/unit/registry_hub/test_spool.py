"""Partial downloads on disk."""

import errno
import os
import time

import pytest

from helios.errors import NoSpace, Unavailable
from helios.names import RepoId
from registry.pull.listing import RemoteFile
from registry.pull.spool import KEEP_S, Spool

REPO = RepoId.parse("org/m")
FILE = RemoteFile("a/b.bin", 10, "a" * 40, "b" * 64)


def test_bytes_written_are_there_for_the_next_attempt(tmp_path):
    first = Spool(tmp_path).partial(REPO, FILE)
    assert first.open() == []
    first.write(memoryview(b"world"), 5)
    first.done([1])
    assert first.path.read_bytes() == b"\0\0\0\0\0world"  # no buffer of ours in between
    again = Spool(tmp_path).partial(REPO, FILE)
    assert again.open() == [1]
    again.write(memoryview(b"hello"), 0)
    again.done([0, 7])
    buffer = bytearray(10)
    assert again.read_into(memoryview(buffer), 0) == 10
    assert buffer == b"helloworld"
    again.remove()
    assert list(tmp_path.glob("*/*/*/*")) == []
    assert Spool(tmp_path).partial(REPO, FILE).open() == []


def test_a_journal_cut_short_by_a_kill_counts_as_far_as_it_goes(tmp_path):
    partial = Spool(tmp_path).partial(REPO, FILE)
    partial.open()
    partial.done([3, 4])
    with partial.path.with_suffix(".blocks").open("ab") as journal:
        journal.write(b"\5\0")
    again = Spool(tmp_path).partial(REPO, FILE)
    assert again.open() == [3, 4]
    again.done([6])
    assert Spool(tmp_path).partial(REPO, FILE).open() == [3, 4, 6]


def test_a_file_of_another_size_counts_for_nothing(tmp_path):
    partial = Spool(tmp_path).partial(REPO, FILE)
    partial.open()
    partial.done([0])
    os.truncate(partial.path, 3)
    assert Spool(tmp_path).partial(REPO, FILE).open() == []


def test_a_removed_file_stays_readable_for_whoever_has_it(tmp_path):
    partial = Spool(tmp_path).partial(REPO, FILE)
    partial.open()
    partial.write(memoryview(b"0123456789"), 0)
    fd = partial.duplicate()
    partial.remove()
    assert os.pread(fd, 10, 0) == b"0123456789"
    os.close(fd)


def test_repositories_never_share_a_directory(tmp_path):
    names = [RepoId.parse("a/b"), RepoId.parse("a/b", "datasets"), RepoId.parse("b"), RepoId.parse("a-b/c")]
    assert len({Spool(tmp_path).partial(name, FILE).path for name in names}) == len(names)


def test_what_is_removed_and_what_stays(tmp_path):
    spool, other = Spool(tmp_path), RemoteFile("c", 5, "c" * 40, None)
    for file in (FILE, other):
        spool.partial(REPO, file).open()
    spool.remove(REPO, {other.key})
    assert {path.name for path in tmp_path.glob("*/*/*/*")} == {f"{other.key}.partial", f"{other.key}.blocks"}
    spool.remove(REPO)
    assert list(tmp_path.glob("*/*/*")) == []
    spool.remove(REPO)


def test_what_nobody_touches_for_a_week_goes(tmp_path):
    spool = Spool(tmp_path)
    old, young = spool.partial(REPO, FILE), spool.partial(RepoId.parse("gpt2"), FILE)
    for partial in (old, young):
        partial.open()
        partial.close()
    for path in (*old.path.parent.iterdir(), old.path.parent):
        os.utime(path, (time.time() - KEEP_S - 60,) * 2)
    beside = spool.partial(RepoId.parse("gpt2"), RemoteFile("c", 5, "c" * 40, None))
    beside.open()
    beside.close()
    os.utime(beside.path, (time.time() - KEEP_S - 60,) * 2)
    os.utime(beside.path.with_suffix(".blocks"), (time.time() - KEEP_S - 60,) * 2)
    spool.expire()
    assert not old.path.parent.exists()
    assert not beside.path.exists()
    assert young.path.exists()


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    partial = Spool(tmp_path).partial(REPO, FILE)
    partial.open()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpace, match="no space left for downloads"):
        partial.write(memoryview(b"x"), 0)


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(Unavailable, match="can't be written"):
        Spool(tmp_path).partial(REPO, FILE)
