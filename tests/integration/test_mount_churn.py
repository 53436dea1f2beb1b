"""A native mount in a storm: files are opened, mapped, read, evicted and filled while workers are killed.

Nobody sees it, and when everybody has gone home nothing is open, promised, pending or taken."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from heliosfs.fuse.tables import open_files
from tests.support.disks import small_disk
from tests.support.mounts import MODES, Mount, board, call, forget_names, mounted, next_worker, push, worker, write

EVERY = bool(os.environ.get("HELIOS_EVERY_CRASH"))
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.timeout(3600 if EVERY else 300),
    pytest.mark.skipif("native" not in MODES, reason="native mounts need root and Linux 6.9"),
]

MIB = 1 << 20
FILES = {f"part-{n}.bin": random.Random(n).randbytes(12 * MIB + n) for n in range(4)} | {"small.txt": b"x" * 5000}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
KILLS = 60 if EVERY else 8
MAPPED = "part-0.bin"


class Visitors:
    """Threads that open, read and map files in every way, past the kernel's cache, until they are told to stop."""

    def __init__(self, files: Path, count: int) -> None:
        self._files, self._over = files, threading.Event()
        self.errors: list[str] = []
        self.visits = 0
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._over.is_set():
            name = rng.choice(sorted(FILES))
            try:
                self._visit(rng, name)
            except (OSError, AssertionError) as error:
                self.errors.append(f"{name}: {error!r}")
            self.visits += 1

    def _visit(self, rng: random.Random, name: str) -> None:
        data = FILES[name]
        with (self._files / name).open("rb", buffering=0) as file, contextlib.ExitStack() as stack:
            if rng.random() < 0.3:
                stack.enter_context((self._files / name).open("rb"))  # as safetensors does
            how = rng.randrange(3)
            if how == 0:
                assert hashlib.file_digest(file, "sha256").hexdigest() == DIGESTS[name], "read wrong"  # type: ignore[arg-type]
            elif how == 1:
                for _ in range(10):
                    offset, count = rng.randrange(len(data)), rng.randrange(300_000)
                    assert os.pread(file.fileno(), count, offset) == data[offset : offset + count], "read wrong"
            else:
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                    for _ in range(10):
                        offset = rng.randrange(len(data))
                        assert view[offset : offset + 9000] == data[offset : offset + 9000], "mapped wrong"
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a reader hangs"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 64, "ext4") as path:
        yield path


def used(disk: Path) -> int:
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_a_storm_leaves_nothing(helios_home: Home, tmp_path: Path, disk: Path, wait_for: Any) -> None:
    commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
    environ = {"HELIOS_MOUNT__CACHE": str(disk / "cache"), "HELIOS_MOUNT__MODE": "native"}
    with mounted(helios_home, tmp_path / "mnt", **environ) as mount:
        files, empty = mount.path / "org/name" / commit, used(disk)
        with (files / MAPPED).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            visitors = Visitors(files, 8)
            try:
                for number in range(KILLS):
                    if number % 3:
                        evict(mount)  # it dies while files are filled
                    else:
                        wait_for(lambda: passed_through(mount), timeout_s=60, what="the kernel to read whole files")
                    view.madvise(mmap.MADV_DONTNEED)
                    serving = worker(mount)
                    serving.send(signal.SIGKILL)
                    assert hashlib.sha256(view).hexdigest() == DIGESTS[MAPPED], "mapped wrong"
                    next_worker(mount, serving)
            finally:
                visitors.stop()
            assert visitors.errors == []
            assert visitors.visits > KILLS
        forget_names(mount)
        for gauge in ("open_handles", "fills", "cache_reserved_bytes", "inherited_files", "oldest_request_seconds"):
            name = f"helios_mount_{gauge}"
            wait_for(lambda name=name: mount.metric(name) == 0, timeout_s=60, what=f"{name} to be 0")
        wait_for(lambda: mount.metric("helios_mount_inodes") <= 1, what="all inodes but the root to be forgotten")
        with contextlib.closing(board(mount)) as shared:
            assert list(open_files(shared)) == []
            wait_for(lambda: shared.oldest_ns == 0, what="no request to be pending")
        evict(mount)
        assert mount.metric("helios_mount_cache_used_bytes") == 0
        wait_for(lambda: used(disk) <= empty + MIB, what="the kernel to let go of every file")


def passed_through(mount: Mount) -> bool:
    """Whether this worker has opened a file for the kernel to read."""
    return mount.metric("helios_mount_passthrough_opens_total") > 0


def evict(mount: Mount) -> None:
    """What is not in use goes. The worker that is asked may be a dead one."""
    try:
        call(mount, "POST", "evict", {"model": "org/name"})
    except Exception as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno == errno.EIO:
            raise
