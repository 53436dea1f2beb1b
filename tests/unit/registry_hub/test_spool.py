"""Partial downloads on disk."""

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
    partial = Spool(tmp_path).open(REPO).partial(FILE)
    assert partial.size == 0
    with partial.append() as out:
        out.write(b"hello")
        assert out.size == 5
        assert partial.path.read_bytes() == b"hello"  # no buffer of ours in between
    again = Spool(tmp_path).open(REPO).partial(FILE)
    with again.append() as out:
        assert out.size == 5
        out.write(b"world")
    assert again.path.read_bytes() == b"helloworld"
    with again.append() as out:
        out.restart()
        out.write(b"x")
    assert again.path.read_bytes() == b"x"


def test_blobs_in_use_by_unfinished_pulls(tmp_path):
    spool = Spool(tmp_path / "not" / "there" / "yet")
    assert spool.held() == set()
    spool.open(REPO).hold("1" * 64)
    spool.open(RepoId.parse("gpt2")).hold("2" * 64)
    with (spool.open(REPO).directory / "held").open("a") as file:
        file.write("3" * 10)  # a line cut short by a kill
    assert spool.held() == {"1" * 64, "2" * 64}
    assert spool.remove(REPO) == {"1" * 64}
    assert spool.held() == {"2" * 64}
    assert spool.remove(REPO) == set()


def test_repositories_never_share_a_directory(tmp_path):
    spool = Spool(tmp_path)
    names = [RepoId.parse("a/b"), RepoId.parse("a/b", "datasets"), RepoId.parse("b"), RepoId.parse("a-b/c")]
    assert len({spool.open(name).directory for name in names}) == len(names)


def test_what_nobody_touches_for_a_week_goes(tmp_path):
    spool = Spool(tmp_path)
    old, young = spool.open(REPO), spool.open(RepoId.parse("gpt2"))
    old.hold("1" * 64)
    young.hold("2" * 64)
    for path in (old.directory / "held", old.directory):
        os.utime(path, (time.time() - KEEP_S - 60,) * 2)
    assert spool.expire() == {"1" * 64}
    assert not old.directory.exists()
    assert spool.held() == {"2" * 64}


def test_a_full_disk_is_said(tmp_path):
    """/dev/full: every write to it fails with ENOSPC, as on a full disk."""
    partial = Spool(tmp_path).open(REPO).partial(FILE)
    partial.path.symlink_to("/dev/full")
    with partial.append() as out, pytest.raises(NoSpace, match="no space left for downloads"):
        out.write(b"x")


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(Unavailable, match="can't be written"):
        Spool(tmp_path).open(REPO)
