"""Warm reads through the mount beside the same file read directly.

A model is published with `helios push` and mounted with `helios mount`, on a HELIOS_HOME of its own, and read once, so
that the local tier has it whole. Then readers (benchmarks/readers.py: the same for both, processes that start together,
each with its part of the file) read it: sequentially, 4 KiB and 1 MiB at random places, and one byte of every mapped
page; 1 reader and 8. In each round:

- ``direct``: the local tier's own file, in the page cache: the yardstick;
- ``mount``: through the mount, whose own pages were dropped before (the local tier's were not): what a first reader
  gets. READ requests that Python answers meanwhile are counted; with passthrough there are none;
- ``again``: the same reads once more, with what the kernel kept of them.

``CPU x`` is what a byte costs the readers' CPU through the mount beside direct: on a busy machine that says more.

``partial`` is one reader of the local half of a file whose other half is still on its way, beside the same bytes read
from the local tier's sparse file. With --peers the same readers read a smaller object through `rclone mount
--vfs-cache-mode full` and `s3fs`, each with a warm cache of its own on the disk, its kernel pages dropped as ours.

    python -m benchmarks.warm_read [--gb 2] [--rounds 3] [--readers 1 8] [--peers] [--directory DIR]

Targets: >= 0.95x of direct, no READ in Python; partial >= 1.5 GB/s where direct gives 9 (0.17x). Python's own cost of a
call is part of both sides: of ``rand4k`` it is most of direct.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import BackedMemory, options, save
from benchmarks.ingest import drop_cache, make_model
from benchmarks.peers import missing, peer, store
from benchmarks.plots import draw
from benchmarks.readers import BLOCKS, Reading, read_together
from benchmarks.scene import (
    attribute,
    helios,
    local_file,
    mounted,
    read_through,
    reads,
    registry,
    stoppable,
    wait_until_whole,
)
from helios.home import Home
from tests.support.mounts import Mount
from tests.support.slow_link import SlowLink

TARGET, PARTIAL_TARGET = 0.95, 1.5 / 9
COUNTS = {"rand4k": 16000, "rand1m": 1024}
"""Random reads of all readers together."""
MODEL = "bench/model"
PEER_GB = 0.5
FIRST_HALF = 400e6
"""Bytes a second over the link while the first half comes: slow enough that the other does not come along."""
TRICKLE = 10e6
"""Bytes a second over the link while a file is half there: its fill goes on and neither ends nor competes."""


def measured(way: str, path: Path, size: int, readers: int, seed: int) -> Reading:
    return read_together(way, path, size, readers, COUNTS.get(way, 0), seed)


def cell(
    way: str, readers: int, seed: int, mount: Mount, path: Path, direct: Path, memory: BackedMemory
) -> dict[str, float]:
    """One way to read, with so many readers, one round; GB/s."""
    size = direct.stat().st_size
    drop_cache([path])
    memory.fill()
    read_through(direct)
    plain = measured(way, direct, size, readers, seed)
    drop_cache([path])
    memory.fill()
    read_through(direct)
    before = reads(mount)
    first = measured(way, path, size, readers, seed)
    asked = reads(mount) - before
    again = measured(way, path, size, readers, seed)
    return {
        "direct": plain.rate / 1e9,
        "mount": first.rate / 1e9,
        "again": again.rate / 1e9,
        "ratio": first.rate / plain.rate,
        "again_ratio": again.rate / plain.rate,
        "reads": asked,
        "cpu_ratio": (first.cpu_s / first.bytes) / (plain.cpu_s / plain.bytes),
    }


def whole(home: Home, work: Path, rounds: int, counts: list[int], memory: BackedMemory) -> dict[str, Any]:
    """All ways through a mount of what is published on the home, beside its registry."""
    rows: dict[str, list[dict[str, float]]] = {f"{way}_{count}": [] for way in BLOCKS for count in counts}
    with mounted(home, work / "mnt") as mount:
        path = next((mount.path / MODEL / "@main").iterdir())
        read_through(path)
        wait_until_whole(path)
        direct = local_file(mount, path)
        print(f"mode {mount.state['mode']} ({mount.state['reason']})")
        heads = ("direct", "mount", "again", "mount x", "again x")
        print(f"{'GB/s':10}{'readers':>8}{''.join(f'{head:>9}' for head in heads)}{'READs':>8}{'CPU x':>7}")
        for number in range(rounds):
            for way in BLOCKS:
                for count in counts:
                    row = cell(way, count, number, mount, path, direct, memory)
                    rows[f"{way}_{count}"].append(row)
                    rates = "".join(f"{row[key]:9.2f}" for key in ("direct", "mount", "again", "ratio", "again_ratio"))
                    print(f"{way:10}{count:8}{rates}{row['reads']:8.0f}{row['cpu_ratio']:7.2f}", flush=True)
        return {"mode": mount.state["mode"], "reason": mount.state["reason"], "cells": rows}


def partial(url: str, work: Path, rounds: int, memory: BackedMemory) -> list[dict[str, float]]:
    """The local half of a file that a remote registry is still sending."""
    parts = urlsplit(url)
    with SlowLink(parts.hostname or "", parts.port or 0, FIRST_HALF) as link:
        with mounted(Home(work / "half"), work / "half-mnt", urls=link.url) as mount:
            path = next((mount.path / MODEL / "@main").iterdir())
            size = path.stat().st_size // 2
            held = os.open(path, os.O_RDONLY)
            try:
                read_through(path, size)
                link.throttle.rate = TRICKLE
                return [_half(mount, path, size, memory) for _ in range(rounds)]
            finally:
                os.close(held)
                link.throttle.rate = None  # what is under way ends quickly


def _half(mount: Mount, path: Path, size: int, memory: BackedMemory) -> dict[str, float]:
    direct = local_file(mount, path)
    drop_cache([path])
    memory.fill()
    read_through(direct, size)
    plain = read_together("seq", direct, size, 1)
    before = reads(mount)
    ours = read_together("seq", path, size, 1)
    asked = reads(mount) - before
    if attribute(path, "tier") != "partial":
        raise SystemExit("the file became whole while its half was measured: give it more --gb")
    row = {"direct": plain.rate / 1e9, "mount": ours.rate / 1e9, "ratio": ours.rate / plain.rate, "reads": asked}
    print(f"{'partial':10}{1:8}{row['direct']:9.2f}{row['mount']:9.2f}{'':9}{row['ratio']:9.2f}{'':9}{asked:8.0f}")
    return row


def beside_peers(work: Path, gigabytes: float, counts: list[int], memory: BackedMemory) -> dict[str, dict[str, float]]:
    """GB/s of each peer's mount, and of a plain file of that size, one round."""
    (file,) = make_model(work / "object", int(min(gigabytes, PEER_GB) * 1e9), 1, seed=2)
    rates: dict[str, dict[str, float]] = {}
    with store(work, file) as url:
        for name in ("rclone", "s3fs"):
            with peer(name, work, url, file) as path:
                rates[name] = {}
                for way in BLOCKS:
                    for count in counts:
                        drop_cache([path])
                        memory.fill()
                        reading = measured(way, path, file.stat().st_size, count, 0)
                        rates[name][f"{way}_{count}"] = reading.rate / 1e9
                        print(f"{name:10}{way:10}{count:4}{reading.rate / 1e9:9.2f} GB/s", flush=True)
    return rates


def run(gigabytes: float, rounds: int, counts: list[int], directory: Path, *, peers: bool) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-warm-", dir=directory))
    memory, home = BackedMemory(directory), Home(work / "home")
    try:
        print(f"making {gigabytes:g} GB under {work}", file=sys.stderr)
        make_model(work / "model", int(gigabytes * 1e9), 1)
        with registry(home) as url:
            helios(home, "push", work / "model", MODEL)
            shutil.rmtree(work / "model")
            result = whole(home, work, rounds, counts, memory)
            result["cells"]["partial"] = partial(url, work, rounds, memory)
        if peers:
            result["peers"] = beside_peers(work, gigabytes, counts, memory)
        cells = result["cells"].items()
        result["median"] = {name: statistics.median(row["ratio"] for row in rows) for name, rows in cells}
        result["cpu"] = {
            name: statistics.median(row["cpu_ratio"] for row in rows) for name, rows in cells if name != "partial"
        }
        result["reads"] = sum(row["reads"] for name, rows in cells if name != "partial" for row in rows)
        return {"benchmark": "warm_read", "bytes": int(gigabytes * 1e9), "time": int(time.time()), **result}
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def bars_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What the plot shows: medians in GB/s."""
    groups: dict[str, dict[str, float]] = {}
    for name, rows in result["cells"].items():
        keys = [key for key in ("direct", "mount", "again") if key in rows[0]]
        groups[name] = {key: statistics.median(row[key] for row in rows) for key in keys}
    for name, rates in result.get("peers", {}).items():
        for key, rate in rates.items():
            groups[key][name] = rate
    return groups


def main() -> None:
    parser = options("Measure warm reads through the mount beside direct ones.", gb=2, rounds=3, space="3x")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 8], help="how many at a time (1 8)")
    parser.add_argument("--peers", action="store_true", help="beside rclone mount and s3fs too")
    args = parser.parse_args()
    if args.peers and (gone := missing()):
        parser.error(f"--peers needs {', '.join(f'{name} ({how})' for name, how in gone.items())}")
    with stoppable():
        result = run(args.gb, args.rounds, args.readers, args.directory.resolve(), peers=args.peers)
    out = save(result, args.json)
    draw(out, "Warm reads", "GB/s", bars_of(result))
    print("  ".join(f"{name} {ratio:.2f}x" for name, ratio in result["median"].items()))
    print(f"targets: {TARGET}x, partial {PARTIAL_TARGET:.2f}x, no READ in Python ({result['reads']:.0f} were answered)")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
