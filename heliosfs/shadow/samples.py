"""Which reads are compared, how many may wait, and what came of it. No I/O in here.

A READ that passes through the process is taken with a chance of ``percent``. The reads of a file that the kernel reads
itself are not seen; so when it is opened about ``percent`` of its blocks are taken, at random, ``MAX_RANGES`` at most.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from typing import Final

from heliosfs.fetch.source import BlobRef

BLOCK: Final = 1 << 20
"""Bytes of a range that is taken of a file that the kernel reads itself."""

MAX_RANGES: Final = 8
"""Most ranges for one open of such a file."""

MAX_WAITING: Final = 64
MAX_BYTES: Final = 32 << 20
"""Most samples that are not compared yet, and their bytes; more are dropped, and counted."""

REMEMBERED: Final = 1000
"""Latencies that quantiles are made of, the latest ones."""

SHOWN: Final = 20
"""Mismatches that are told in full, the latest ones."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes of a file as a user got them: ``data``, after ``seconds``; or the file that the kernel reads for them."""

    want: BlobRef
    offset: int
    count: int
    data: bytes = b""
    seconds: float = 0.0
    file: FileIO | None = None

    @property
    def way(self) -> str:
        return "read" if self.file is None else "passthrough"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where the mount and a plain download differ; ``first`` is the first such byte of the file."""

    repo: str
    commit: str
    path: str
    way: str
    offset: int
    count: int
    first: int
    mount_sha256: str
    download_sha256: str
    time: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds, of the latest ``samples``."""

    samples: int = 0
    p50: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """By nearest rank."""
        ordered, count = sorted(seconds), len(seconds)
        return cls(count, ordered[(count - 1) // 2], ordered[-(-99 * count // 100) - 1]) if count else cls()


@dataclass(frozen=True, slots=True)
class Report:
    """What was found since the process started; ``waiting`` is now."""

    percent: float = 0.0
    compared: int = 0
    bytes: int = 0
    mismatches: int = 0
    mount_errors: int = 0
    download_errors: int = 0
    dropped: int = 0
    waiting: int = 0
    mount_seconds: Latency = Latency()
    download_seconds: Latency = Latency()
    last_mismatches: list[Mismatch] = field(default_factory=list)


class Sampler:
    """Chooses. ``random_`` decides; threads may share it."""

    def __init__(self, percent: float, random_: random.Random) -> None:
        self.percent, self._random = percent, random_

    def one(self) -> bool:
        """Whether this READ is taken."""
        return self._random.random() * 100 < self.percent

    def ranges(self, size: int) -> list[tuple[int, int]]:
        """Offset and length of what is taken of a file of this size that was opened."""
        blocks = -(-size // BLOCK)
        count = blocks * self.percent / 100
        count = int(count) + (self._random.random() < count % 1)
        chosen = self._random.sample(range(blocks), min(int(count), MAX_RANGES))
        return [(block * BLOCK, min(BLOCK, size - block * BLOCK)) for block in chosen]


class Tally:
    """Counts, and what waits. Used under a lock."""

    def __init__(self, percent: float) -> None:
        self.percent = percent
        self.waiting = self.waiting_bytes = self.dropped = 0
        self.compared = self.bytes = self.mismatches = self.mount_errors = self.download_errors = 0
        self.mount_s: deque[float] = deque(maxlen=REMEMBERED)
        self.download_s: deque[float] = deque(maxlen=REMEMBERED)
        self.last: deque[Mismatch] = deque(maxlen=SHOWN)

    def admit(self, count: int, *, readable: bool = True) -> bool:
        """Whether a sample of so many bytes may wait; one that may not, or could not be read, is dropped."""
        if not readable or self.waiting >= MAX_WAITING or self.waiting_bytes + count > MAX_BYTES:
            self.dropped += 1
            return False
        self.waiting += 1
        self.waiting_bytes += count
        return True

    def drop(self, count: int) -> None:
        """An admitted sample can't be kept after all."""
        self.done(count)
        self.dropped += 1

    def done(self, count: int) -> None:
        """An admitted sample waits no more."""
        self.waiting -= 1
        self.waiting_bytes -= count

    def found(self, count: int, mount_s: float, download_s: float, mismatch: Mismatch | None) -> None:
        """Both sides were read."""
        self.compared += 1
        self.bytes += count
        self.mount_s.append(mount_s)
        self.download_s.append(download_s)
        if mismatch is not None:
            self.mismatches += 1
            self.last.append(mismatch)

    def report(self) -> Report:
        return Report(
            self.percent,
            self.compared,
            self.bytes,
            self.mismatches,
            self.mount_errors,
            self.download_errors,
            self.dropped,
            self.waiting,
            Latency.of(self.mount_s),
            Latency.of(self.download_s),
            list(self.last),
        )
