"""Ingest against its yardstick: seeded random bf16 tensors into a directory store with SQLite metadata.

The yardstick is the slower of two things that no ingest can do without, both measured in the same run, round by round:

- hashing: sha256 and BLAKE3 side by side, in two threads, over the same files;
- writing: as many bytes from memory into one preallocated file, fsynced at the end. Done twice, through the page cache
  (with early writeback) and with O_DIRECT; the faster of the two counts.

The ingest runs in a process of its own, whose RssAnon + RssShmem are sampled every 20 ms. Before each measurement the
source files are read once, so that hashing and ingest both find in the page cache what fits there, as after a download.
With --cold they are dropped from it instead (posix_fadvise on our own files): then the ingest reads and writes the same
disk at once, while each half of the yardstick has it alone.

    python -m benchmarks.ingest [--gb 10] [--rounds 3] [--shards 4] [--cold] [--directory DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, BackedMemory, Sampler, options, save

SLAB = 4 << 20


def make_model(directory: Path, total: int, shards: int, seed: int = 1) -> list[Path]:
    """Safetensors shards of ``total`` bytes in all: layers of one small and several large bf16 tensors, all random."""
    import numpy as np

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        tensors: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        left = total // shards
        offset = 0
        layer = 0
        while left > 0:
            for name, width in (("norm", 4096), ("q_proj", 4096 * 4096), ("up_proj", 4096 * 11008)):
                size = min(2 * width, left) & ~1
                if size:
                    tensors[f"model.layers.{shard}.{layer}.{name}.weight"] = {
                        "dtype": "BF16", "shape": [size // 2], "data_offsets": [offset, offset + size],
                    }  # fmt: skip
                    offset += size
                    left -= size
            layer += 1
            left = 0 if left < 2 else left
        header = json.dumps(tensors, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        path = directory / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        random = np.random.SFC64(np.random.SeedSequence([seed, shard]))
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for start in range(0, offset, SLAB):
                count = min(SLAB, offset - start)
                file.write(memoryview(random.random_raw(-(-count // 8))).cast("B")[:count])
            file.flush()
            os.fsync(file.fileno())
        paths.append(path)
    return paths


def warm_cache(paths: list[Path]) -> None:
    """Read the files once."""
    for _ in read_slabs(paths):
        pass


def drop_cache(paths: list[Path]) -> None:
    """Take our own files out of the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_slabs(paths: list[Path]) -> Iterator[memoryview]:
    """The files' bytes in pieces of 4 MiB, each in one of eight reused buffers."""
    buffers = [memoryview(bytearray(SLAB)) for _ in range(8)]
    number = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := file.readinto(buffers[number % 8]):
                yield buffers[number % 8][:count]
                number += 1


def measure_hashing(paths: list[Path]) -> float:
    """Seconds to hash the files with sha256 and BLAKE3 side by side, each thread reading for itself."""
    from blake3 import blake3

    def sha256() -> None:
        for path in paths:
            digest = hashlib.sha256()
            for slab in read_slabs([path]):
                digest.update(slab)
            digest.hexdigest()

    def blake() -> None:
        for slab in read_slabs(paths):
            blake3(slab).digest()

    return timed(lambda: in_threads(sha256, blake))


def measure_writing(path: Path, total: int, *, direct: bool) -> float:
    """Seconds to write ``total`` bytes, rounded up to a block, into a new file and fsync it."""
    from heliosfs.store.syscalls import reserve, start_writeback

    source = memoryview(mmap.mmap(-1, 8 * SLAB))
    source[:] = os.urandom(len(source))
    total = -(-total // 4096) * 4096

    def write() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0), 0o600)
        try:
            reserve(fd, total)
            offset = clean = 0
            while offset < total:
                start = offset % len(source)
                offset += os.pwrite(fd, source[start : start + min(SLAB, total - offset)], offset)
                if not direct and offset - clean >= 16 << 20:
                    start_writeback(fd, clean, offset - clean)
                    clean = offset
            os.fsync(fd)
        finally:
            os.close(fd)

    try:
        return timed(write)
    finally:
        path.unlink(missing_ok=True)


def measure_ingest(store: Path, paths: list[Path]) -> dict[str, float]:
    """Ingest the files in a process of its own: seconds, its peak memory in bytes, its CPU seconds."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--child", str(store), *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        sampler = Sampler(process.pid)
        assert process.stdout is not None
        out = process.stdout.read()
        process.wait()
        peak = sampler.stop()
    if process.returncode:
        raise SystemExit(f"the ingest failed with {process.returncode}")
    return {**json.loads(out), "peak_bytes": peak}


def child(root: Path, paths: list[Path]) -> None:
    """The measured process: prints its result as JSON."""
    from heliosfs.store.directory import DirectoryStore
    from registry.ingest import FileSource, Ingest
    from registry.metadata.content import SqlChunkIndex
    from registry.metadata.database import Database

    root.mkdir(parents=True)
    database = Database.sqlite(root / "registry.db")
    new = 0
    cpu = time.process_time()
    start = time.perf_counter()
    with DirectoryStore(root / "store") as store:
        ingest = Ingest(store, SqlChunkIndex(database))
        for path in paths:
            with FileSource(path) as source:
                new += ingest.ingest(path.name, source.size, source).new_bytes
        seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    database.close()
    if new != sum(path.stat().st_size for path in paths):
        raise SystemExit(f"only {new} bytes were new: two chunks are equal")
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu}))


def in_threads(*calls: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run(gigabytes: float, rounds: int, shards: int, directory: Path, *, cold: bool = False) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-ingest-", dir=directory))
    memory = BackedMemory(directory)
    try:
        print(f"making {gigabytes:g} GB in {shards} shards under {work}", file=sys.stderr)
        paths = make_model(work / "model", int(gigabytes * 1e9), shards)
        total = sum(path.stat().st_size for path in paths)
        prepare = drop_cache if cold else warm_cache
        measured = []
        for number in range(rounds):
            prepare(paths)
            memory.fill()
            hashing = measure_hashing(paths)
            memory.fill()
            cached = measure_writing(work / "written", total, direct=False)
            direct = measure_writing(work / "written", total, direct=True)
            prepare(paths)
            memory.fill()
            ingest = measure_ingest(work / f"store-{number}", paths)
            shutil.rmtree(work / f"store-{number}")
            row = {"hash_s": hashing, "write_s": cached, "write_direct_s": direct, **ingest}
            row["ratio"] = max(hashing, min(cached, direct)) / ingest["seconds"]
            measured.append(row)
            print_row(f"round {number + 1}", row, total)
        median = {key: statistics.median(row[key] for row in measured) for key in measured[0]}
        median["peak_bytes"] = max(row["peak_bytes"] for row in measured)
        print_row("median", median, total)
        return {
            "benchmark": "ingest",
            "bytes": total,
            "cold": cold,
            "rounds": measured,
            "median": median,
            "time": int(time.time()),
        }
    finally:
        memory.close()
        shutil.rmtree(work)


COLUMNS = ("GB/s", "hash", "write", "direct", "ingest", "ratio", "cpu s/GB", "peak MB")
HEADER = "".join(f"{name:>10}" for name in COLUMNS)


def print_row(name: str, row: dict[str, float], total: int) -> None:
    if name == "round 1":
        print(HEADER)
    rates = "".join(f"{total / 1e9 / row[key]:10.2f}" for key in ("hash_s", "write_s", "write_direct_s", "seconds"))
    cpu = row["cpu_seconds"] / (total / 1e9)
    print(f"{name:10}{rates}{row['ratio']:10.2f}{cpu:10.2f}{row['peak_bytes'] / 1e6:10.0f}", flush=True)


def main() -> None:
    parser = options("Measure ingest beside its yardstick.", gb=10, rounds=3, space="3x")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--cold", action="store_true", help="read the sources from disk, not from the page cache")
    parser.add_argument("--child", nargs="+", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1:])
        return
    result = run(args.gb, args.rounds, args.shards, args.directory.resolve(), cold=args.cold)
    print(f"written to {save(result, args.json)}", file=sys.stderr)


if __name__ == "__main__":
    main()
