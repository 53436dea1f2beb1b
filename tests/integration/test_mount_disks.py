"""A mount whose cache lies on a disk that fills up, turns read-only, comes back, or was cut off from power: reads go on
and are right all the time."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from tests.support.disks import covered, fail, fill_up, small_disk
from tests.support.mounts import Mount, mounted, next_worker, push, worker, write

pytestmark = pytest.mark.fuse

MIB = 1 << 20
FILES = {f"part-{n}.bin": random.Random(n).randbytes(6 * MIB + n) for n in range(4)} | {"config.json": b"{}"}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture
def commit(helios_home: Home, tmp_path: Path) -> str:
    return push(helios_home, write(tmp_path / "model", FILES), "org/name")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 64, "ext4") as path:
        yield path


def right(mount: Mount, commit: str, *names: str) -> None:
    """Files are read, past the kernel's cache, and are what was published."""
    for name in names or FILES:
        with (mount.path / "org/name" / commit / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert hashlib.file_digest(file, "sha256").hexdigest() == DIGESTS[name], f"{name} read wrong"


def whole(mount: Mount, commit: str, *names: str) -> bool:
    files = mount.path / "org/name" / commit
    return {os.getxattr(files / name, "user.helios.tier") for name in names or DIGESTS} == {b"l1"}


def other_worker(mount: Mount) -> None:
    """Where a worker can be replaced it is: the next one has to start on the disk as it is."""
    if mount.state["worker"]:
        serving = worker(mount)
        serving.send(signal.SIGKILL)
        next_worker(mount, serving)


def test_a_disk_that_others_fill(helios_home: Home, tmp_path: Path, disk: Path, commit: str, wait_for: Any) -> None:
    with mounted(helios_home, tmp_path / "mnt", HELIOS_MOUNT__CACHE=str(disk / "cache")) as mount:
        right(mount, commit, "part-0.bin")
        wait_for(lambda: whole(mount, commit, "part-0.bin"), what="the first file to be whole")
        others = fill_up(disk)
        for _ in range(2):
            right(mount, commit)
            other_worker(mount)
        assert not whole(mount, commit)
        others.unlink()
        right(mount, commit)
        wait_for(lambda: whole(mount, commit), timeout_s=60, what="all files to be whole")
        right(mount, commit)


def test_a_disk_that_turns_read_only(
    helios_home: Home, tmp_path: Path, disk: Path, commit: str, wait_for: Any, expected_log_errors: Any
) -> None:
    expected_log_errors("the cache could not be flushed")
    mnt, environ = tmp_path / "mnt", {"HELIOS_MOUNT__CACHE": str(disk / "cache")}
    with mounted(helios_home, mnt, **environ) as mount:
        right(mount, commit, "part-0.bin")
        wait_for(lambda: whole(mount, commit, "part-0.bin"), what="the first file to be whole")
        with (mnt / "org/name" / commit / "part-1.bin").open("rb") as file:
            first = file.read(MIB)
            fail(disk)
            for _ in range(2):
                right(mount, commit)
                other_worker(mount)
            assert first + file.read() == FILES["part-1.bin"]


def test_a_directory_that_is_read_only_for_a_while(
    helios_home: Home, tmp_path: Path, disk: Path, commit: str, wait_for: Any
) -> None:
    with mounted(helios_home, tmp_path / "mnt", HELIOS_MOUNT__CACHE=str(disk / "cache")) as mount:
        right(mount, commit, "part-0.bin")
        with covered(disk / "cache"):
            for _ in range(2):
                right(mount, commit)
                other_worker(mount)
        right(mount, commit)
        wait_for(lambda: whole(mount, commit), timeout_s=60, what="all files to be whole")
        right(mount, commit)
