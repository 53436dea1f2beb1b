"""Load on a mount while its sources fail: many readers of small and large files, each byte compared.

HELIOS_STORM_S lengthens a storm (seconds); HELIOS_STORM_SEED chooses another one.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helios.http.client import HttpClient
from tests.support.mounts import Mount
from tests.support.reading import outcome, touch, within

MIB = 1 << 20
STORM_S = float(os.environ.get("HELIOS_STORM_S", "3"))
SEED = int(os.environ.get("HELIOS_STORM_SEED", "1"))
READERS = 8

SLACK_S = 5.0
"""How much later than the mount a reader may see an answer, on a busy machine."""

CALL_READS = 3
"""One call through the page cache may be so many READs, one after the other: one that somebody else waits for, one of
what the kernel reads ahead, and one of the page itself. Past the page cache it is one."""

PAGE = mmap.PAGESIZE

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
    """Readers of a commit's files below the descriptor ``directory``, and what they saw. ``until``, on the monotonic
    clock, is when they end; ``read_s`` how long the mount may take for one READ. Slowest: of the calls that are one
    READ, and of the others."""

    mount: Mount
    commit: str
    directory: int
    until: float
    read_s: float
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})

    def run(self) -> None:
        threads = [threading.Thread(target=self._read, args=(number,), daemon=True) for number in range(READERS)]
        threads.append(threading.Thread(target=self._evict, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self.until - time.monotonic()) + 2 * self.longest_s(alone=False))
            assert not thread.is_alive(), "a reader hangs"

    def longest_s(self, *, alone: bool) -> float:
        """How long a call may take that is one READ alone, or several."""
        return (1 if alone else CALL_READS) * self.read_s + SLACK_S

    def slowest(self) -> str:
        return f"slowest {self.slowest_s[True]:.1f} s past the page cache, {self.slowest_s[False]:.1f} s by it"

    def _read(self, number: int) -> None:
        dice = random.Random(f"{SEED}:{number}")
        while time.monotonic() < self.until:
            name = dice.choice(sorted(FILES))
            try:
                direct = dice.random() < 0.4
                fd = os.open(name, os.O_RDONLY | os.O_DIRECT * direct, dir_fd=self.directory)
                try:
                    os.posix_fadvise(fd, 0, 0, dice.choice((os.POSIX_FADV_RANDOM, os.POSIX_FADV_NORMAL)))
                    for _ in range(dice.randrange(1, 5)):
                        self._once(dice, name, fd, direct)
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

    def _once(self, dice: random.Random, name: str, fd: int, direct: bool) -> None:
        data, offset = FILES[name], dice.randrange(len(FILES[name]))
        if direct:
            offset -= offset % PAGE  # the disk's own, where the kernel reads a whole file itself
        begin = time.monotonic()
        try:
            if direct:
                found = past_the_page_cache(fd, dice.choice((PAGE, 16 * PAGE)), offset)
            elif dice.random() < 0.5:
                found = os.pread(fd, dice.choice((1, 4096, 65536)), offset)
            else:
                found = touch(fd, 1, offset)
            self.seen["right"] += 1
            if not found or found != data[offset : offset + len(found)]:
                self.wrong.append(f"{name}: {len(found)} wrong bytes at {offset}")
        except OSError as error:
            self._failed(name, error)
        took = time.monotonic() - begin
        self.slowest_s[direct] = max(self.slowest_s[direct], took)
        if took > self.longest_s(alone=direct):
            self.wrong.append(f"{name}: an answer after {took:.1f} s, {'past' if direct else 'by'} the page cache")

    def _failed(self, name: str, error: OSError) -> None:
        if error.errno in (errno.EIO, errno.EFAULT):  # a mapping's way to say EIO to the kernel itself
            self.seen["EIO"] += 1
        else:
            self.wrong.append(f"{name}: {error}")


def past_the_page_cache(fd: int, size: int, offset: int) -> bytes:
    """One READ of a file that is open with O_DIRECT, which wants whole pages."""
    with mmap.mmap(-1, size) as buffer:
        return buffer[: os.preadv(fd, [buffer], offset)]


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
