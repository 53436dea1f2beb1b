"""What the benchmarks share: their options, where results go, the memory of a process and of the machine."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def options(description: str, *, gb: float, rounds: int, space: str) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks of files have; ``space`` is the room they need, in words."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--gb", type=float, default=gb, help=f"size in GB ({gb:g})")
    parser.add_argument("--rounds", type=int, default=rounds)
    directory = Path(tempfile.gettempdir())
    parser.add_argument("--directory", type=Path, default=directory, help=f"where to work; needs {space} --gb")
    parser.add_argument("--json", type=Path, help="where the result goes; default benchmarks/results/")
    return parser


def save(result: Mapping[str, Any], path: Path | None) -> Path:
    """Write a benchmark's result as JSON and return where; ``result`` has its name and its time."""
    out = path or RESULTS / f"{result['benchmark']}-{result['time']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return out


def together(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds until all of the calls, each in a thread of its own, have ended. Raises what the first failed one did."""
    with ThreadPoolExecutor(len(calls)) as threads:
        start = time.perf_counter()
        for done in [threads.submit(call) for call in calls]:
            done.result()
        return time.perf_counter() - start


def random_file(path: Path, size: int) -> None:
    """A file of random bytes: nothing in it compresses or repeats."""
    with path.open("wb") as file:
        for start in range(0, size, 4 << 20):
            file.write(os.urandom(min(4 << 20, size - start)))


class BackedMemory:
    """Fills free memory with clean page cache, as on a machine that has been up for a while.

    In a virtual machine free memory may belong to the host until it is touched (free page reporting); the first touch
    of a page then costs several times the copy that is to be measured. On the reference machine a plain sequential
    write reaches 0.4 GB/s into such pages and 4 GB/s into reclaimed ones. Call ``fill`` before each timed phase, of the
    yardstick too: then neither pays for pages that the other one left.
    """

    KEEP_FREE = 256 << 20

    def __init__(self, directory: Path) -> None:
        self._directory, self._files = directory, list[int]()

    def fill(self) -> None:
        """Read holes of a sparse file until little memory is free."""
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:"))
        size = free - self.KEEP_FREE
        if size <= 0:
            return
        fd, path = tempfile.mkstemp(dir=self._directory)
        os.unlink(path)
        self._files.append(fd)
        os.ftruncate(fd, size)
        buffer = bytearray(1 << 20)
        for offset in range(0, size, len(buffer)):
            os.preadv(fd, [buffer], offset)

    def close(self) -> None:
        """Let go of the pages."""
        for fd in self._files:
            os.close(fd)
        self._files.clear()


def memory_of(pid: int) -> int:
    """RssAnon + RssShmem of a running process, in bytes. Raises OSError when it is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


class Sampler(threading.Thread):
    """The peak RssAnon + RssShmem in bytes of a running process, looked at every 20 ms."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self._stop_now = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_now.wait(0.02):
            try:
                self.peak = max(self.peak, memory_of(self.pid))
            except OSError:
                return

    def stop(self) -> int:
        self._stop_now.set()
        self.join()
        return self.peak
