"""A model's small files from the memory pool, beside the same files in a plain directory.

The cache of the mount lies on a tmpfs that is full, so the disk takes nothing. Every small file is read once, then all
weights, which could push them out; from then on the registry is stopped. Each sample is one open(2), the whole file by
read(2), close(2), of a file whose pages were taken out of the page cache before, in turn for both. The directory of the
commit is held open: names above it age, and a registry that is silent delays whoever asks for them anew.

- ``plain``: the published directory, on the disk of --directory;
- ``mount``: the mount, whose only copy is in the pool.

Memory is RssAnon + RssShmem of the process that serves the mount, the highest meanwhile.

    python -m benchmarks.small_files [--gb 0.5] [--rounds 100] [--directory DIR]

Needs root (a tmpfs is mounted). Targets: p99 < 50 ms for every file; memory < 250 MB + the pool.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Sampler, options, save
from benchmarks.ingest import make_model
from benchmarks.plots import draw
from benchmarks.scene import helios, mounted, percentile, read_through, registry, stoppable, worker
from helios.config import MountSettings
from helios.embedded import running
from helios.home import Home
from tests.support.disks import fill_up, small_disk

MODEL = "bench/model"
POOL_BYTES = MountSettings().pool_mib << 20
TARGET_S = 0.05
MEMORY = 250e6 + POOL_BYTES
SIZES = {
    "config.json": 900,
    "generation_config.json": 200,
    "tokenizer_config.json": 50_000,
    "model.safetensors.index.json": 120_000,
    "vocab.txt": 1_000_000,
    "tokenizer.json": 9_000_000,
}
"""Bytes of the small files, as large models have them."""


def make_small(directory: Path) -> list[Path]:
    """Write the small files, each of its own content."""
    out = []
    for name, size in SIZES.items():
        path = directory / name
        path.write_text(json.dumps({"text": random.Random(name).randbytes(size // 2).hex()})[:size])
        out.append(path)
    return out


def sample(directory: int, name: str) -> float:
    """Seconds of one cold open, read and close in an open directory."""
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    start = time.perf_counter()
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    count = 0
    while part := os.read(fd, 1 << 20):
        count += len(part)
    os.close(fd)
    seconds = time.perf_counter() - start
    if count != SIZES[name]:
        raise SystemExit(f"{name} has {count} bytes instead of {SIZES[name]}")
    return seconds


def run(gigabytes: float, rounds: int, directory: Path) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-small-", dir=directory))
    home = Home(work / "home")
    try:
        weights = make_model(work / "model", int(gigabytes * 1e9), 2)
        small = make_small(work / "model")
        os.sync()
        with small_disk(work / "disk", 16) as disk, registry(home) as url:
            helios(home, "push", work / "model", MODEL)
            environ = {"HELIOS_MOUNT__CACHE": str(disk)}
            with mounted(home, work / "mnt", urls=url, environ=environ) as mount:
                fill_up(disk)
                files = (mount.path / MODEL / "@main").resolve()
                sampler = Sampler(worker(mount))
                for path in (*small, *weights):
                    read_through(files / path.name)
                stopped = running(home)
                if stopped is None:
                    raise SystemExit("the registry is gone")
                sides = {"plain": work / "model", "mount": files}
                places = {side: os.open(path, os.O_RDONLY | os.O_DIRECTORY) for side, path in sides.items()}
                os.kill(stopped.pid, signal.SIGSTOP)
                try:
                    seconds: dict[str, dict[str, list[float]]] = {
                        path.name: {"plain": [], "mount": []} for path in small
                    }
                    for _ in range(rounds):
                        for name in SIZES:
                            for side, place in places.items():
                                seconds[name][side].append(sample(place, name))
                finally:
                    os.kill(stopped.pid, signal.SIGCONT)
                    for place in places.values():
                        os.close(place)
                pool = json.loads(mount.page("/api/v1/status"))["pool"]
                mode, memory = mount.state["mode"], sampler.stop()
        rows = {
            name: {
                f"{side}_{part}_s": percentile(samples, share)
                for side, samples in both.items()
                for part, share in (("p50", 0.5), ("p99", 0.99))
            }
            for name, both in seconds.items()
        }
        worst = max(row["mount_p99_s"] for row in rows.values())
        return {
            "benchmark": "small_files",
            "mode": mode,
            "files": rows,
            "worst_p99_s": worst,
            "memory_bytes": memory,
            "pool": pool,
            "weights_bytes": sum(path.stat().st_size for path in weights),
            "time": int(time.time()),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Measure small files from the memory pool.", gb=0.5, rounds=100, space="3x")
    args = parser.parse_args()
    if os.getuid() != 0:
        parser.error("this mounts a tmpfs, which needs root")
    with stoppable():
        result = run(args.gb, args.rounds, args.directory.resolve())
    print(
        f"mode {result['mode']}; {result['weights_bytes'] / 1e9:.1f} GB of weights read before; the registry is stopped"
    )
    print(f"{'cold read, ms':30}{'plain p50':>10}{'p99':>8}{'mount p50':>11}{'p99':>8}")
    for name, row in result["files"].items():
        cells = [row[f"{side}_{part}_s"] * 1e3 for side in ("plain", "mount") for part in ("p50", "p99")]
        print(f"{name:30}{cells[0]:10.2f}{cells[1]:8.2f}{cells[2]:11.2f}{cells[3]:8.2f}")
    print(f"worst p99 {result['worst_p99_s'] * 1e3:.1f} ms (target {TARGET_S * 1e3:.0f} ms)")
    used = result["pool"]["used"] / 1e6
    print(f"memory {result['memory_bytes'] / 1e6:.0f} MB (target {MEMORY / 1e6:.0f} MB), of which pool {used:.0f} MB")
    out = save(result, args.json)
    bars = {
        name: {side: row[f"{side}_p99_s"] * 1e3 for side in ("plain", "mount")} for name, row in result["files"].items()
    }
    draw(out, "Small files, cold, p99", "ms", bars)
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
