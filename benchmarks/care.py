"""Looking at cached bytes again beside the bare reads and hashes that it is made of.

One file, read past the page cache in chunks of 4 MiB, ways in turn: reads alone, ``scrub`` (XXH3), reads and BLAKE3,
``verify`` (BLAKE3 against the recipe, and XXH3). Scrubbing is slow on purpose, so it is its CPU seconds that count.

    python -m benchmarks.care [--gb 1] [--rounds 3] [--directory DIR]

Target: ``verify`` >= 0.8x the speed of reads and BLAKE3; these take >= 1.5x the CPU time of ``scrub``.
"""

from __future__ import annotations

import hashlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from benchmarks import plots
from benchmarks.common import options, save
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from heliosfs.tiers.examine import DiskReader, Examination
from heliosfs.tiers.sums import Sums, Tally

VERIFY_TARGET = 0.8
SCRUB_TARGET = 1.5


def make(path: Path, size: int) -> Sums:
    """A file of chunks that differ, on the disk, and its sums."""
    block = random.Random(1).randbytes(MAX_CHUNK)
    chunks, parts, whole = [], [], hashlib.sha256()
    with path.open("wb") as file:
        for number in range(max(1, size // MAX_CHUNK)):
            data = number.to_bytes(8, "little") + block[8:]
            file.write(data)
            whole.update(data)
            chunks.append((blake3(data).digest(), len(data)))
            parts.append(memoryview(data)[:8])
        os.fsync(file.fileno())
    recipe = Recipe.build(whole.hexdigest(), chunks)
    tally = Tally(recipe)
    for index, part in enumerate(parts):
        tally.note(index, memoryview(bytes(part) + block[8:]))
    return tally.sums()


def ways(path: Path, sums: Sums) -> dict[str, Callable[[], None]]:
    """What is measured, by name."""

    def bare(use: Callable[[memoryview], object]) -> None:
        reader = DiskReader(str(path))
        for index in range(len(sums.recipe)):
            start, end = sums.recipe.span(index)
            use(reader.read(start, end - start))
        reader.close()

    def look(strong: bool) -> None:
        examination = Examination(str(path), sums.recipe.blob, sums, strong=strong)
        while examination.step():
            pass
        examination.close()
        if examination.bad or examination.fresh is not None:
            raise SystemExit(f"the file is not what was written: {examination.reason}")

    return {
        "read": lambda: bare(len),
        "scrub": lambda: look(False),
        "read_blake3": lambda: bare(lambda data: blake3(data).digest()),
        "verify": lambda: look(True),
    }


def main() -> None:
    args = options("Measure looking at cached bytes again.", gb=1.0, rounds=3, space="1x").parse_args()
    rows: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        path = Path(directory) / "blob"
        sums = make(path, int(args.gb * 1e9))
        size = sums.recipe.size
        for _ in range(args.rounds):
            row = {}
            for name, run in ways(path, sums).items():
                cpu, began = time.process_time(), time.perf_counter()
                run()
                seconds = time.perf_counter() - began
                row[name] = {"gb_s": size / seconds / 1e9, "cpu_s_gb": (time.process_time() - cpu) / (size / 1e9)}
            rows.append(row)
    median: dict[str, Any] = {
        name: {unit: statistics.median(row[name][unit] for row in rows) for unit in ("gb_s", "cpu_s_gb")}
        for name in rows[0]
    }
    print(f"{'':12} {'GB/s':>6} {'CPU s/GB':>9}")
    for name, found in median.items():
        print(f"{name:12} {found['gb_s']:6.2f} {found['cpu_s_gb']:9.3f}")
    ratios = {
        "verify_ratio": statistics.median(row["verify"]["gb_s"] / row["read_blake3"]["gb_s"] for row in rows),
        "scrub_saves": statistics.median(row["read_blake3"]["cpu_s_gb"] / row["scrub"]["cpu_s_gb"] for row in rows),
    }
    print(
        f"verify {ratios['verify_ratio']:.2f}x of reads and BLAKE3, "
        f"which take {ratios['scrub_saves']:.1f}x the CPU time of scrub"
    )
    median |= ratios
    result = {
        "benchmark": "care", "time": int(time.time()), "bytes": size, "rounds": rows, "median": median,
    }  # fmt: skip
    out = save(result, args.json)
    groups = {name: {"GB/s": median[name]["gb_s"]} for name in rows[0]}
    plot = plots.draw(out, "Looking at cached bytes again", "GB/s", groups)
    print(f"targets {VERIFY_TARGET}x, {SCRUB_TARGET}x; written to {out} and {plot}")


if __name__ == "__main__":
    main()
