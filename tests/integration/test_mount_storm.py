"""A store whose answers go wrong, under load: right bytes or EIO, never a wrong byte, never late; and then all is well.

HELIOS_STORM_S lengthens the storm (seconds); HELIOS_STORM_SEED chooses another one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helios.config import Config
from helios.embedded import attach
from helios.home import Home
from helios.http.client import HttpClient
from tests.support.caches import verify
from tests.support.front import FAULTS, Front, nothing, seeded
from tests.support.mounts import MODES, Mount, mounted, push, write
from tests.support.reading import outcome, touch, within

pytestmark = pytest.mark.fuse

MIB = 1 << 20
STORM_S = float(os.environ.get("HELIOS_STORM_S", "3"))
SEED = int(os.environ.get("HELIOS_STORM_SEED", "1"))
READERS = 8
DEADLINE_S = 1.0
PATIENCE_S = 4 * DEADLINE_S
"""heliosfs/fetch/read.py: the longest that one READ of a mount with one registry may take."""

LONGEST_S = 3 * PATIENCE_S + 8.0
"""One call of a reader may be three READs, one after the other: one that somebody else waits for, one of what the
kernel reads ahead, and one of the page itself. And the machine is busy."""

MADE = random.Random(7)
FILES = {f"small-{number}.txt": MADE.randbytes(100_000 + 77_777 * number) for number in range(20)}
FILES |= {
    "one.txt": MADE.randbytes(9 * MIB + 1),
    "left.txt": MADE.randbytes(17 * MIB),
    "filled.bin": MADE.randbytes(9 * MIB),
}
FILES["shared.txt"] = FILES["one.txt"][: 4 * MIB] + MADE.randbytes(MIB)  # lies in two objects


@dataclass
class Load:
    """Readers of a commit's files, and what they saw."""

    mount: Mount
    commit: str
    directory: int
    until: float
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def run(self) -> None:
        threads = [threading.Thread(target=self._read, args=(number,), daemon=True) for number in range(READERS)]
        threads.append(threading.Thread(target=self._evict, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self.until - time.monotonic()) + 2 * LONGEST_S)
            assert not thread.is_alive(), "a reader hangs"

    def _read(self, number: int) -> None:
        dice = random.Random(f"{SEED}:{number}")
        while time.monotonic() < self.until:
            name = dice.choice(sorted(FILES))
            try:
                fd = os.open(name, os.O_RDONLY, dir_fd=self.directory)
                try:
                    os.posix_fadvise(fd, 0, 0, dice.choice((os.POSIX_FADV_RANDOM, os.POSIX_FADV_NORMAL)))
                    for _ in range(dice.randrange(1, 5)):
                        self._once(dice, name, fd)
                finally:
                    os.close(fd)
            except OSError as error:
                self._failed(name, error)

    def _evict(self) -> None:
        """What nobody has open goes, so that there is always something to fetch."""
        with contextlib.closing(HttpClient(f"unix:{self.mount.state['socket']}", timeout_s=30)) as client:
            while time.monotonic() < self.until:
                client.json("POST", "/api/v1/evict", body={"model": "org/name", "revision": self.commit})
                time.sleep(0.1)

    def _once(self, dice: random.Random, name: str, fd: int) -> None:
        data, offset = FILES[name], dice.randrange(len(FILES[name]))
        begin = time.monotonic()
        try:
            if dice.random() < 0.5:
                found = os.pread(fd, dice.choice((1, 4096, 65536)), offset)
            else:
                found = touch(fd, 1, offset)
            self.seen["right"] += 1
            if not found or found != data[offset : offset + len(found)]:
                self.wrong.append(f"{name}: {len(found)} wrong bytes at {offset}")
        except OSError as error:
            self._failed(name, error)
        took = time.monotonic() - begin
        self.slowest_s = max(self.slowest_s, took)
        if took > LONGEST_S:
            self.wrong.append(f"{name}: an answer after {took:.1f} s")

    def _failed(self, name: str, error: OSError) -> None:
        if error.errno in (errno.EIO, errno.EFAULT):  # a mapping's way to say EIO to the kernel itself
            self.seen["EIO"] += 1
        else:
            self.wrong.append(f"{name}: {error}")


@pytest.fixture
def front(helios_home: Home) -> Iterator[Front]:
    with attach(Config(), helios_home) as registry, Front(registry.urls[0]) as front:
        yield front


@contextlib.contextmanager
def commit_directory(mount: Mount, commit: str) -> Iterator[int]:
    """A commit's directory whose names are known: the storm is about the bytes."""
    directory = os.open(mount.path / "org/name" / commit, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in FILES:
            os.stat(name, dir_fd=directory)
        yield directory
    finally:
        os.close(directory)


def right_in_the_end(path: Path, data: bytes) -> None:
    """The file can be read as soon as the sources are well; what still waits for a fault of before may be EIO."""
    end = time.monotonic() + 60
    while True:
        found = within(60, lambda: outcome(lambda: uncached(path)))
        if found != errno.EIO:
            assert found == data
            return
        assert time.monotonic() < end, f"{path} can't be read though nothing is wrong any more"
        time.sleep(0.1)


def uncached(path: Path) -> bytes:
    """What the mount has, not what the kernel remembers of it."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_faults_gives_right_bytes_or_eio_in_time(
    helios_home: Home, front: Front, tmp_path: Path, expected_log_errors: Any, mode: str
) -> None:
    expected_log_errors("a chunk is corrupt")
    commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
    environ = {"HELIOS_MOUNT__MODE": mode, "HELIOS_MOUNT__REQUEST_DEADLINE_S": f"{DEADLINE_S:g}"}
    with mounted(helios_home, tmp_path / "mnt", "--registry", front.url, **environ) as mount:
        files = mount.path / "org/name" / commit
        with commit_directory(mount, commit) as directory:
            front.plan = seeded(SEED, 0.5)
            load = Load(mount, commit, directory, time.monotonic() + STORM_S)
            load.run()
            assert load.wrong == []
            assert load.seen["right"] > READERS
            assert set(front.struck) == set(FAULTS)
            print(f"{mode}: {dict(load.seen)}, slowest {load.slowest_s:.1f} s, faults: {dict(front.struck)}")
            front.plan = nothing
        for name in sorted(FILES.keys() - {"left.txt"}):
            right_in_the_end(files / name, FILES[name])
    whole, chunks = verify(helios_home.cache)
    assert whole + chunks > 0  # small files may be in memory alone
    with mounted(helios_home, tmp_path / "mnt", "--registry", front.url, **environ) as mount:
        for name, data in FILES.items():
            assert (mount.path / "org/name" / commit / name).read_bytes() == data
