"""The table of mounts, state files and locks."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from helios.errors import InvalidInput
from helios.home import Home
from helios.lockfile import LockFile, held
from helios.mounting import prepare
from helios.mounts import MountState, canonical, claim, find_mount, mount_table, state_of, states, write_state
from tests.support.disks import fill_up, small_disk

MOUNTINFO = r"""22 27 0:20 / /sys rw,nosuid - sysfs sysfs rw
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue
90 36 0:53 / /tmp/a\040b\011c\134d ro,nosuid,nodev,noatime shared:3 - fuse.helios helios ro,user_id=0
91 36 0:54 / /mnt2 ro - fuse.helios helios ro
"""


def state(mountpoint: Path) -> MountState:
    fields = {"mountpoint": str(mountpoint), "pid": 1, "start": "x:1", "since": 1.0, "cache": "/c", "registry": []}
    return MountState(**fields, socket="/s", log=None, created=False)


def test_the_kernels_table_is_read_with_its_escapes():
    entries = mount_table(MOUNTINFO)
    assert [str(e.mountpoint) for e in entries] == ["/sys", "/mnt2", "/tmp/a b\tc\\d", "/mnt2"]
    assert (entries[1].fstype, entries[1].source, entries[1].device) == ("ext3", "/dev/root", "98:0")
    assert entries[2].fstype == "fuse.helios"
    assert [e.root for e in entries] == ["/", "/mnt1", "/", "/"]
    assert entries[2].options == {"ro", "nosuid", "nodev", "noatime"}


def test_the_topmost_mount_counts(monkeypatch):
    monkeypatch.setattr("helios.mounts._table", MOUNTINFO.splitlines)
    assert find_mount(Path("/mnt2")).fstype == "fuse.helios"
    assert find_mount(Path("/mnt")) is None


def test_links_are_resolved_but_a_mount_point_is_not_looked_at(tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to("real")
    (real / "mnt").symlink_to(tmp_path / "elsewhere")
    assert canonical(tmp_path / "link" / "x" / ".." / "y") == real / "y"
    assert canonical(tmp_path / "link" / "mnt") == tmp_path / "elsewhere"
    entry = f"1 1 0:1 / {real}/mnt ro - fuse.helios helios ro\n"
    monkeypatch.setattr("helios.mounts._table", entry.splitlines)
    looked_at, islink = [], os.path.islink
    monkeypatch.setattr(os.path, "islink", lambda path: looked_at.append(path) or islink(path))
    assert canonical(tmp_path / "link" / "mnt") == real / "mnt"
    assert canonical(tmp_path / "link" / "mnt" / "org" / "name") == real / "mnt" / "org" / "name"
    assert not [path for path in looked_at if path.startswith(f"{real}/mnt")]


def test_links_of_parents_lead_where_the_kernel_goes(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "up").symlink_to("a/b/..")
    (tmp_path / "deep").symlink_to("up/b")
    for path in ("up/x", "deep/../x", "deep/missing", "up/b/../../x/y", "a"):
        assert canonical(tmp_path / path) == Path(os.path.realpath(os.path.abspath(tmp_path / path)))
    assert canonical(Path("/")) == Path("/")


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        canonical(tmp_path / "a")


def test_a_mount_point_that_is_not_text_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="UTF-8"):
        prepare(Home(tmp_path / "home"), Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))


def test_a_claim_is_seen_by_others_and_says_who_holds_it(tmp_path):
    home, mountpoint = Home(tmp_path / "home"), tmp_path / "mnt"
    lock = claim(home, mountpoint)
    assert states(home) == [], "nothing is written yet"
    lock.write(msgspec.json.encode(state(mountpoint)))
    assert state_of(home, mountpoint) == state(mountpoint)
    assert states(home) == [(state(mountpoint), True)]
    assert claim(home, mountpoint) is None
    lock.release()
    assert states(home) == []
    again = claim(home, mountpoint)
    assert again is not None
    again.release()


HOLDER = """
import sys
from pathlib import Path
from helios.lockfile import LockFile
lock = LockFile.acquire(Path(sys.argv[1]))
lock.write(b"me")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_holder_leaves_a_free_lock_and_its_words(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert held(path)
        assert LockFile.acquire(path) is None
        holder.kill()
    assert not held(path)
    lock = LockFile.acquire(path)
    assert lock.read() == b"me"
    lock.release()
    assert not path.exists()


def test_a_missing_file_is_not_held_and_is_not_made(tmp_path):
    assert not held(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_one_of_many_has_the_lock_at_any_time(tmp_path):
    path = tmp_path / "lock"
    inside, most, rounds = [], [], []

    def work():
        while len(rounds) < 200:
            lock = LockFile.acquire(path)
            if lock is not None:
                inside.append(1)
                most.append(len(inside))
                inside.pop()
                rounds.append(1)
                lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


def test_a_full_disk_takes_other_words_in_the_same_place(tmp_path):
    """Also when somebody takes each byte that becomes free at once: here the file keeps its blocks."""
    with small_disk(tmp_path / "disk", 1) as disk:
        path = disk / "state"
        lock = LockFile.acquire(path)
        lock.write(b"first words, a longer line" * 10)
        blocks = path.stat().st_blocks
        fill_up(disk)
        lock.write(b"second words")
        assert lock.read() == path.read_bytes() == b"second words"
        write_state(path, b"third words" * 20)
        assert path.read_bytes() == b"third words" * 20
        assert path.stat().st_blocks == blocks
        lock.release()
