"""A mount whose cache lies on a disk that fills up, turns read-only, comes back, or was cut off from power: reads go on
and are right all the time."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from helios.home import Home
from heliosfs.store.chunking import cut_plain
from heliosfs.store.recipe import Recipe
from heliosfs.tiers import bitmap
from tests.conftest import processes_of
from tests.support.accounts import on_disk
from tests.support.disks import covered, fail, fill_up, small_disk
from tests.support.mounts import MODES, Mount, call, kill, mounted, next_worker, push, run, worker, write

pytestmark = pytest.mark.fuse

MIB = 1 << 20
FILES = {f"part-{n}.bin": random.Random(n).randbytes(6 * MIB + n) for n in range(4)} | {"config.json": b"{}"}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture(params=MODES, autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode that the test mounts in."""
    monkeypatch.setenv("HELIOS_MOUNT__MODE", request.param)


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


def kept_again(mount: Mount, commit: str) -> bool:
    """Read everything once more; whether the cache has it all."""
    right(mount, commit)
    return whole(mount, commit)


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
        wait_for(lambda: kept_again(mount, commit), timeout_s=60, what="all files to be whole")
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
        wait_for(lambda: kept_again(mount, commit), timeout_s=60, what="all files to be whole")
        right(mount, commit)


def test_what_a_power_cut_left_is_put_right(helios_home: Home, tmp_path: Path, commit: str, wait_for: Any) -> None:
    """Zero-length and short files, a torn journal, chunks that never reached the disk, leftovers: as if they were not
    there. What is right stays."""
    mnt = tmp_path / "mnt"
    cache = tmp_path / "elsewhere" / "cache"  # not beside the store: nothing is linked
    with small_disk(tmp_path / "elsewhere", 64):
        environ = {"HELIOS_MOUNT__CACHE": str(cache)}
        with mounted(helios_home, mnt, **environ) as mount:
            right(mount, commit)
            wait_for(lambda: whole(mount, commit), what="all files to be whole")
            call(mount, "PUT", "volumes/v1", {"model": "org/name"})
            call(mount, "POST", "pin", {"model": "org/name"})
            kill(mount.state)
            run(helios_home, "umount", mnt)
            blobs = {name: cache / "blobs" / digest[:2] / digest for name, digest in DIGESTS.items()}
            os.truncate(blobs["part-0.bin"], 0)
            os.truncate(blobs["part-1.bin"], 3 * MIB)
            tear(cache, blobs["part-2.bin"], FILES["part-2.bin"])
            (cache / "uses").write_bytes(b"")
            (cache / ".pins.tmp").write_bytes(b"helios-pi")
            (cache / "volumes" / ".0123.tmp").write_bytes(b"")
            (cache / "partial" / f"{'ab' * 32}.map").write_bytes(b"")
            for path in cache.glob("catalog.db*"):
                path.write_bytes(path.read_bytes()[:512] + bytes(8192))
            for path in helios_home.run.glob("nodes-*.log"):
                path.write_bytes(path.read_bytes()[:-7] + bytes(64))
        with mounted(helios_home, mnt, **environ) as mount:
            assert whole(mount, commit, "part-3.bin"), "what was not harmed stays"
            right(mount, commit)
            assert (mnt / ".volumes/v1/model/part-2.bin").read_bytes() == FILES["part-2.bin"]
            wait_for(lambda: whole(mount, commit), what="all files to be whole again")
            right(mount, commit)
            assert len(call(mount, "GET", "cache")["pins"]) == 1
            assert not list((cache / "partial").iterdir())
            assert mount.metric("helios_mount_cache_used_bytes") == on_disk(cache)


def tear(cache: Path, path: Path, data: bytes) -> None:
    """Make a whole blob one that was being filled: a chunk was recorded, what follows never reached the disk.

    Of the next entry the journal has half."""
    recipe = Recipe.build(path.name, ((blake3(part).digest(), len(part)) for part in cut(data)))
    head = bitmap.start(recipe)
    seed = bitmap.replay(head, path.name).seed
    partial = cache / "partial" / path.name
    partial.with_suffix(".map").write_bytes(
        head + bitmap.entries(seed, len(head), [0]) + bitmap.entries(seed, len(head) + 12, [1])[:7]
    )
    start, _ = recipe.span(1)
    partial.with_suffix(".data").write_bytes(data[:start] + bytes(len(data) - start))
    path.unlink()


def cut(data: bytes) -> Iterator[bytes]:
    offset = 0
    for length in cut_plain(len(data)):
        yield data[offset : offset + length]
        offset += length


SKEWED = """
import time
real, real_ns = time.time, time.time_ns
def offset():
    try:
        with open({path!r}) as file:
            return float(file.read() or 0)
    except OSError:
        return 0.0
time.time = lambda: real() + offset()
time.time_ns = lambda: real_ns() + int(offset() * 1e9)
"""


def test_a_clock_that_jumps(helios_home: Home, tmp_path: Path, commit: str, wait_for: Any) -> None:
    """The time of day is believed for nothing but what is shown."""
    clock, mnt = tmp_path / "clock", tmp_path / "mnt"
    write(tmp_path / "skewed", {"sitecustomize.py": SKEWED.format(path=str(clock)).encode()})
    path = os.pathsep.join([str(tmp_path / "skewed"), os.environ.get("PYTHONPATH", "")])
    with small_disk(tmp_path / "disk", 64) as disk:
        environ = {"PYTHONPATH": path, "HELIOS_MOUNT__CACHE": str(disk / "cache")}
        with mounted(helios_home, mnt, **environ) as mount:
            for number, years in enumerate((0, -25, 25)):
                clock.write_text(str(years * 365 * 86400))
                right(mount, commit)
                assert mount.metric("helios_mount_oldest_request_seconds") < 60
                wait_for(lambda: whole(mount, commit), what="all files to be whole")
                changed = write(tmp_path / "model", {"config.json": b"%d" % number})
                newer = push(helios_home, changed, "org/name")
                wait_for(lambda newer=newer: os.readlink(mnt / "org/name/@main") == newer, what="the link to move")
                assert (mnt / "org/name/@main/config.json").read_bytes() == b"%d" % number
                run(helios_home, "evict", "org/name", "--mount", mnt)
                other_worker(mount)
                right(mount, commit)


def test_a_home_without_any_room(helios_home: Home, tmp_path: Path) -> None:
    """Everything of Helios lies on one disk, and others fill it to the last byte."""
    with small_disk(helios_home.root, 120):
        commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
        with mounted(helios_home, tmp_path / "mnt") as mount:
            right(mount, commit, "part-0.bin")
            others = fill_up(helios_home.root)
            for _ in range(2):
                right(mount, commit)
                other_worker(mount)
            right(mount, commit)
            assert json.loads(run(helios_home, "status", "--json").stdout)["mounts"][0]["alive"]
            others.unlink()
            right(mount, commit)
            other_worker(mount)
            right(mount, commit)
            run(helios_home, "umount", mount.path)
        ended = time.monotonic() + 60
        while processes_of(helios_home) and time.monotonic() < ended:
            time.sleep(0.1)
