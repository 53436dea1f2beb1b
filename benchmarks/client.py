"""``read_into`` of a cached file through heliosfs.client beside os.preadv of the same file.

Both read the same bytes, 16 MiB at a time, into the same buffer, from the same page cache, one right after the other.
On trio each part costs two hops between threads. ``first`` is the time from connect() to the first byte of the cached
file.

    python -m benchmarks.client [--gb 0.5] [--rounds 5] [--directory DIR]

Target: >= 0.95x of os.preadv, on trio >= 0.8x.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

import heliosfs.client
from benchmarks.common import BackedMemory, options, save
from heliosfs.client import aio

PART = 16 << 20
TARGET = 0.95
TRIO_TARGET = 0.8
PASSES = 7
"""Passes over the file in a round, alternating with the yardstick's; their median counts."""
WAYS = (("sync", "direct"), ("trio", "direct_again"))
"""What is measured, and its yardstick."""
HELIOS = Path(sys.executable).parent / "helios"


@contextmanager
def registry(home: Path) -> Iterator[None]:
    """The home's registry, for as long as the block runs."""
    command = [str(HELIOS), "registry", "--port", "0", "--json"]
    process = subprocess.Popen(
        command, env={**os.environ, "HELIOS_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise SystemExit("the registry did not start")
        yield
    finally:
        process.terminate()
        process.wait(30)


def offsets(size: int) -> range:
    return range(0, size, PART)


def direct(path: Path, size: int, buffer: memoryview) -> float:
    """The yardstick: preadv and nothing else."""
    fd = os.open(path, os.O_RDONLY)
    start = time.perf_counter()
    for offset in offsets(size):
        os.preadv(fd, [buffer], offset)
    seconds = time.perf_counter() - start
    os.close(fd)
    return seconds


def synchronous(file: heliosfs.client.File, buffer: memoryview) -> float:
    start = time.perf_counter()
    for offset in offsets(file.size):
        file.read_into(buffer, offset)
    return time.perf_counter() - start


async def on_trio(file: aio.File, buffer: memoryview) -> float:
    start = time.perf_counter()
    for offset in offsets(file.size):
        await file.read_into(buffer, offset)
    return time.perf_counter() - start


def one_round(home: Path, spec: str, name: str, buffer: memoryview, memory: BackedMemory) -> dict[str, float]:
    row: dict[str, float] = {}
    start = time.perf_counter()
    with heliosfs.client.connect(home=home) as store, store.resolve(spec).open(name) as file:
        file.read_into(buffer[:1])
        row["first_s"] = time.perf_counter() - start
        path = file.local_path
        assert path is not None
        memory.fill()
        direct(path, file.size, buffer)
        passes = [(direct(path, file.size, buffer), synchronous(file, buffer)) for _ in range(PASSES)]
        row["direct_s"], row["sync_s"] = map(statistics.median, zip(*passes, strict=True))

    async def again() -> None:
        async with aio.connect(home=home) as store, await (await store.resolve(spec)).open(name) as file:
            passes = [(direct(path, file.size, buffer), await on_trio(file, buffer)) for _ in range(PASSES)]
            row["direct_again_s"], row["trio_s"] = map(statistics.median, zip(*passes, strict=True))

    trio.run(again)
    return row


def run(gigabytes: float, rounds: int, directory: Path) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="helios-client-", dir=directory))
    memory, home = BackedMemory(directory), work / "home"
    buffer = memoryview(bytearray(PART))
    try:
        (work / "m").mkdir()
        size = int(gigabytes * 1e9)
        with (work / "m" / "weights.bin").open("wb") as file:
            for offset in offsets(size):
                file.write(os.urandom(min(PART, size - offset)))
        with registry(home):
            environ = {**os.environ, "HELIOS_HOME": str(home)}
            subprocess.run([str(HELIOS), "push", str(work / "m"), "bench/m"], env=environ, check=True)
            with heliosfs.client.connect(home=home) as store:
                store.resolve("bench/m").warm()
            print(f"{'':9}{'preadv GB/s':>12}{'sync':>8}{'trio':>8}{'sync x':>9}{'trio x':>9}{'first ms':>10}")
            measured = []
            for number in range(rounds):
                measured.append(one_round(home, "bench/m", "weights.bin", buffer, memory))
                show(f"round {number + 1}", measured[-1], size)
        median = {key: statistics.median(row[key] for row in measured) for key in measured[0]}
        for way, beside in WAYS:
            median[f"{way}_ratio"] = statistics.median(row[f"{beside}_s"] / row[f"{way}_s"] for row in measured)
        show("median", median, size)
        return {"benchmark": "client", "bytes": size, "rounds": measured, "median": median, "time": int(time.time())}
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def show(title: str, row: dict[str, float], size: int) -> None:
    speeds = [size / 1e9 / row[f"{way}_s"] for way in ("direct", "sync", "trio")]
    ratios = [row[f"{beside}_s"] / row[f"{way}_s"] for way, beside in WAYS]
    print(
        f"{title:9}{speeds[0]:12.2f}{speeds[1]:8.2f}{speeds[2]:8.2f}"
        f"{ratios[0]:9.2f}{ratios[1]:9.2f}{row['first_s'] * 1000:10.1f}",
        flush=True,
    )


def main() -> None:
    parser = options("Measure reads of a cached file through the client beside preadv.", gb=0.5, rounds=5, space="2x")
    args = parser.parse_args()
    result = run(args.gb, args.rounds, args.directory)
    out = save(result, args.json)
    median = result["median"]
    print(
        f"client: {median['sync_ratio']:.2f}x of preadv, on trio {median['trio_ratio']:.2f}x "
        f"(targets {TARGET}x, {TRIO_TARGET}x); written to {out}"
    )


if __name__ == "__main__":
    main()
