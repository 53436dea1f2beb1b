"""Readers of a file, in processes of their own that start together: the same for a mount and for its yardstick.

    python -m benchmarks.readers WAY PATH OFFSET LENGTH COUNT SEED

is one reader: it opens the file, says ``ready``, waits for a line, reads, and prints JSON. Ways: ``seq`` (read(2), 1
MiB at a time), ``rand4k`` and ``rand1m`` (pread(2) at ``COUNT`` places of the part, none twice), ``mmap`` (one byte of
every page). It ends when whoever started it does.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

BLOCKS = {"seq": 1 << 20, "rand4k": 4096, "rand1m": 1 << 20, "mmap": 4096}
"""Ways to read, and how much at a time in bytes."""


@dataclass(frozen=True)
class Reading:
    """What the readers did together: seconds from the first start to the last end, bytes, CPU seconds of them all."""

    seconds: float
    bytes: int
    cpu_s: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds


def parts(size: int, readers: int, align: int) -> list[tuple[int, int]]:
    """(offset, length) for each reader: they cover ``size`` bytes once, and begin at multiples of ``align``."""
    step = -(-size // readers // align) * align
    return [(start, max(0, min(step, size - start))) for start in (step * number for number in range(readers))]


def places(offset: int, length: int, block: int, count: int, seed: int) -> list[int]:
    """Offsets of at most ``count`` whole blocks of the part, in random order, none twice."""
    blocks = length // block
    return [offset + block * number for number in random.Random(seed).sample(range(blocks), min(count, blocks))]


def read_together(way: str, path: Path, size: int, readers: int, count: int = 0, seed: int = 0) -> Reading:
    """Let ``readers`` processes read the first ``size`` bytes, each its part; ``count``: random reads of all."""
    with ExitStack() as stack:
        processes = []
        for number, (offset, length) in enumerate(parts(size, readers, 1 << 20)):
            arguments = [way, path, offset, length, count // readers, seed * 1000 + number]
            command = [sys.executable, "-m", "benchmarks.readers", *map(str, arguments)]
            process = stack.enter_context(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
                )
            )
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise SystemExit(f"a reader of {path} did not start")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        rows = []
        for process in processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"a reader of {path} ended with {process.wait()}")
            rows.append(json.loads(line))
    seconds = max(row["end"] for row in rows) - min(row["start"] for row in rows)
    return Reading(seconds, sum(row["bytes"] for row in rows), sum(row["cpu_s"] for row in rows))


def read(way: str, fd: int, offset: int, length: int, where: list[int]) -> int:
    """Read as ``way`` says; returns the bytes that were read, for ``mmap`` those of the pages touched."""
    block = BLOCKS[way]
    buffer = memoryview(bytearray(block))
    done = 0
    if way == "mmap":
        if not length:
            return 0
        with mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as mapped:
            for start in range(0, length, 64 << 20):  # the slice is made in C: a byte a page
                done += len(mapped[start : min(start + (64 << 20), length) : block])
        return min(done * block, length)
    if way == "seq":
        os.lseek(fd, offset, os.SEEK_SET)
        while done < length:
            count = os.readv(fd, [buffer[: min(block, length - done)]])
            if not count:
                raise SystemExit(f"the file ended {length - done} bytes early")
            done += count
        return done
    for at in where:
        if os.preadv(fd, [buffer], at) != block:
            raise SystemExit(f"the read at {at} was short")
    return len(where) * block


def main() -> None:
    way, path, *numbers = sys.argv[1:]
    offset, length, count, seed = map(int, numbers)
    where = places(offset, length, BLOCKS[way], count, seed) if way.startswith("rand") else []
    fd = os.open(path, os.O_RDONLY)
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    cpu, start = time.process_time(), time.perf_counter()
    done = read(way, fd, offset, length, where)
    end = time.perf_counter()
    print(json.dumps({"start": start, "end": end, "bytes": done, "cpu_s": time.process_time() - cpu}), flush=True)


if __name__ == "__main__":
    main()
