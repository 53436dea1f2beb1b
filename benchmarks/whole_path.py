"""The whole path on one machine: `helios push`, then the first read through `helios mount`, beside their yardstick.

The yardstick of both is the slower of hashing (sha256 and BLAKE3 side by side) and one fsynced sequential write of as
many bytes, measured in the same round (benchmarks/ingest.py). Both daemons are the real ones, on a HELIOS_HOME of
their own; their RssAnon + RssShmem are sampled every 20 ms. The first read is one reader, file after file, 1 MiB at a
time, with the store's objects dropped from the page cache before; its bytes are compared with the originals by sha256
afterwards, untimed. As on one machine the mount links the store's objects into its cache; with --remote it is given
the registry's URL instead, and every byte is sent, verified and stored again.

    python -m benchmarks.whole_path [--gb 10] [--rounds 3] [--remote] [--directory DIR]

Targets: publish >= 0.5x, first read >= 0.3x, memory < 300 MB each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import BackedMemory, Sampler, options, save
from benchmarks.ingest import drop_cache, make_model, measure_hashing, measure_writing

HELIOS = Path(sys.executable).parent / "helios"
TARGETS = {"publish": 0.5, "first_read": 0.3, "memory_mb": 300}


def helios(home: Path, *args: str) -> str:
    """Run a command on the benchmark's home and return what it printed."""
    environ = {**os.environ, "HELIOS_HOME": str(home)}
    done = subprocess.run([HELIOS, *args], env=environ, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"helios {' '.join(args)} failed with {done.returncode}")
    return done.stdout


def read_through(paths: list[Path]) -> None:
    """Read the files one after another as a plain program would."""
    buffer = bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_round(
    work: Path, model: list[Path], total: int, digests: list[str], memory: BackedMemory, *, remote: bool
) -> dict[str, float]:
    writes = []
    for direct in (False, True):
        memory.fill()
        writes.append(measure_writing(work / "written", total, direct=direct))
    drop_cache(model)
    memory.fill()
    row: dict[str, float] = {"hash_s": measure_hashing(model), "write_s": min(writes)}
    home, mnt = work / "home", work / "mnt"
    environ = {**os.environ, "HELIOS_HOME": str(home)}
    registry = subprocess.Popen([HELIOS, "registry", "--port", "0"], env=environ, stdout=subprocess.PIPE)
    try:
        assert registry.stdout is not None
        url = registry.stdout.readline().decode().split()[0]
        if remote:
            os.environ["HELIOS_REGISTRY__URLS"] = url
        drop_cache(model)
        memory.fill()
        sampler = Sampler(registry.pid)
        start = time.perf_counter()
        pushed = json.loads(helios(home, "push", str(model[0].parent), "bench/model", "--json"))
        row["publish_s"] = time.perf_counter() - start
        if pushed["new_bytes"] < total:
            raise SystemExit(f"only {pushed['new_bytes']} of {total} bytes were new: two chunks are equal")
        helios(home, "mount", str(mnt))
        worker = int((home / "run" / "heliosfs-worker.pid").read_text())
        reading = Sampler(worker)
        drop_cache([path for path in (home / "store").rglob("*") if path.is_file()])
        memory.fill()
        files = [mnt / "bench" / "model" / "@main" / path.name for path in model]
        start = time.perf_counter()
        read_through(files)
        row["first_read_s"] = time.perf_counter() - start
        start = time.perf_counter()
        read_through(files)
        row["second_read_s"] = time.perf_counter() - start
        row["mount_peak_bytes"], row["registry_peak_bytes"] = reading.stop(), sampler.stop()
        if [digest(path) for path in files] != digests:
            raise SystemExit("the mount gave other bytes than were published")
    finally:
        subprocess.run([HELIOS, "umount", str(mnt)], env=environ, check=False)
        os.environ.pop("HELIOS_REGISTRY__URLS", None)
        registry.terminate()
        registry.wait(60)
    shutil.rmtree(home)
    yardstick = max(row["hash_s"], row["write_s"])
    row["publish_ratio"], row["first_read_ratio"] = yardstick / row["publish_s"], yardstick / row["first_read_s"]
    return row


COLUMNS = ("hash_s", "write_s", "publish_s", "first_read_s", "second_read_s")


def show(name: str, row: dict[str, float], total: int) -> None:
    rates = "".join(f"{total / 1e9 / row[key]:11.2f}" for key in COLUMNS)
    memory = f"{row['registry_peak_bytes'] / 1e6:12.0f}{row['mount_peak_bytes'] / 1e6:10.0f}"
    print(f"{name:9}{rates}{row['publish_ratio']:10.2f}{row['first_read_ratio']:10.2f}{memory}", flush=True)


def run(gigabytes: float, rounds: int, directory: Path, *, remote: bool) -> dict[str, Any]:
    """All rounds; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-path-", dir=directory))
    memory = BackedMemory(directory)
    try:
        print(f"making {gigabytes:g} GB under {work}", file=sys.stderr)
        model = make_model(work / "model", int(gigabytes * 1e9), 4)
        total = sum(path.stat().st_size for path in model)
        digests = [digest(path) for path in model]
        titles = "".join(f"{name.removesuffix('_s'):>11}" for name in COLUMNS)
        print(f"{'GB/s':9}{titles}{'publish x':>10}{'read x':>10}{'registry MB':>12}{'mount MB':>10}")
        measured = []
        for number in range(rounds):
            measured.append(one_round(work, model, total, digests, memory, remote=remote))
            show(f"round {number + 1}", measured[-1], total)
        median = {key: statistics.median(row[key] for row in measured) for key in measured[0]}
        for key in ("mount_peak_bytes", "registry_peak_bytes"):
            median[key] = max(row[key] for row in measured)
        show("median", median, total)
        return {
            "benchmark": "whole_path",
            "bytes": total,
            "remote": remote,
            "rounds": measured,
            "median": median,
            "time": int(time.time()),
        }
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Measure publish and first read beside their yardstick.", gb=10, rounds=3, space="4x")
    parser.add_argument("--remote", action="store_true", help="the registry is another machine's: it sends the bytes")
    args = parser.parse_args()
    result = run(args.gb, args.rounds, args.directory, remote=args.remote)
    out = save(result, args.json)
    median = result["median"]
    print(
        f"publish {median['publish_ratio']:.2f}x (target {TARGETS['publish']}x), first read "
        f"{median['first_read_ratio']:.2f}x (target {TARGETS['first_read']}x); written to {out}"
    )


if __name__ == "__main__":
    main()
