"""``helios push`` of a fine-tune over TCP, by its missing chunks, beside sending its files whole as older versions do.

A base model of ``--gb`` is in the registry; a fine-tune has the same tensors but one in ten. Each round pushes two
fine-tunes, one each way, in turns first; and two models of which nothing is known, for what looking first costs. Over
loopback, and over a link (benchmarks/shaped.py) of ``--mbit`` with ``--latency-ms`` of round trip. Seconds are those of
the push from its first look at the files to the commit, in a process of its own; bytes are what it sent.

    python -m benchmarks.push [--gb 0.5] [--rounds 3] [--mbit 1000 ...] [--latency-ms 20] [--directory DIR]

A shaped link needs root, iproute2 and util-linux; ``--mbit`` without a number leaves it out. Targets: over 1 Gbit/s a
fine-tune is there in half the time or less; nothing that a registry does not know is slowed down by more than a third.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, BackedMemory, options, save
from benchmarks.scene import registry, stoppable
from benchmarks.shaped import CLIENT, shaped
from helios.home import Home
from helios.http.client import HttpClient
from helios.names import RepoId
from helios.publish import publish, send_whole
from helios.registry_client import RegistryClient
from heliosfs.store.recipe import MAX_CHUNK
from heliosfs.store.sending import ByChunks
from tests.support.ingest import safetensors

TENSOR = 2 * MAX_CHUNK
CHANGED = 10
"""One tensor in so many differs."""
SHARDS = 4
WAYS = ("chunks", "whole")


def model(directory: Path, size: int, seed: int, changed: int | None) -> None:
    """A model of shards; with ``changed`` every tenth tensor has bytes of its own."""
    directory.mkdir(parents=True)
    block = random.Random(seed).randbytes(TENSOR)
    other = block if changed is None else random.Random(changed).randbytes(TENSOR)
    count = max(SHARDS, size // TENSOR)
    for shard in range(SHARDS):
        tensors = {}
        for number in range(shard, count, SHARDS):
            base = other if number % CHANGED == 0 else block
            half = number.to_bytes(8, "little")
            tensors[f"t{number}"] = half + base[8:MAX_CHUNK] + half + base[MAX_CHUNK + 8 :]  # no two chunks alike
        with (directory / f"model-{shard}.safetensors").open("wb") as file:
            file.write(safetensors(tensors))
            os.fsync(file.fileno())


def push_one(url: str, directory: Path, repo: str, way: str) -> None:
    """Push, and print what it took; run in a process of its own."""
    with closing(RegistryClient(HttpClient(url))) as client:
        start, before = time.perf_counter(), time.process_time()
        sender = ByChunks() if way == "chunks" else send_whole
        pushed = publish(client, directory, RepoId.parse(repo), "main", sender=sender)
        seconds, cpu = time.perf_counter() - start, time.process_time() - before
    took = {"seconds": seconds, "cpu_s": cpu, "sent": pushed.sent_bytes, "new": pushed.new_bytes}
    print(json.dumps(took | {"logical": pushed.logical_bytes}))


def timed(within: Sequence[str], url: str, directory: Path, repo: str, way: str) -> dict[str, float]:
    command = [*within, sys.executable, "-m", "benchmarks.push", "--one", url, str(directory), repo, way]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def one_round(
    number: int, size: int, directory: Path, within: Sequence[str], url: str, memory: BackedMemory
) -> dict[str, dict[str, dict[str, float]]]:
    """Fine-tunes and new models, each both ways: what -> way -> what it took."""
    out: dict[str, dict[str, dict[str, float]]] = {"tuned": {}, "new": {}}
    ways = WAYS if number % 2 == 0 else WAYS[::-1]
    for what in out:
        for turn, way in enumerate(ways):
            seed = 1000 * number + 10 * turn
            made = directory / "pushed"
            model(made, size, *((1, 2 + seed) if what == "tuned" else (3 + seed, None)))
            memory.fill()
            out[what][way] = timed(within, url, made, f"bench/{what}-{number}-{way}", way)
            shutil.rmtree(made)
    return out


def measure(name: str, mbit: float | None, args: Any, root: Path) -> list[dict[str, Any]]:
    """All rounds over one link."""
    size, home = int(args.gb * 1e9), Home(root / f"home-{mbit or 0:g}")
    memory = BackedMemory(root)
    rounds = []
    with shaped(mbit, args.latency_ms) as link:
        receiver, sender = (link.client, link.server) if mbit else ((), ())
        environ = {"HELIOS_REGISTRY__HOST": CLIENT} if mbit else {}
        with registry(home, receiver, environ=environ) as url:
            model(root / "base", size, 1, None)
            timed(sender, url, root / "base", "bench/base", "whole")
            shutil.rmtree(root / "base")
            for number in range(args.rounds):
                took = one_round(number, size, root, sender, url, memory)
                for what, by in took.items():
                    row = {way: f"{by[way]['seconds']:.2f} s, {by[way]['sent'] / 1e6:.1f} MB" for way in WAYS}
                    print(f"{name:12}{what:8}chunks {row['chunks']:22} whole {row['whole']}", flush=True)
                rounds.append(took)
    shutil.rmtree(home.root)
    return rounds


def medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Whole to chunks, seconds of fine-tunes and of new models, and bytes of fine-tunes."""

    def ratio(what: str, figure: str) -> float:
        return statistics.median(each[what]["whole"][figure] / each[what]["chunks"][figure] for each in rounds)

    return {"tuned": ratio("tuned", "seconds"), "new": ratio("new", "seconds"), "bytes": ratio("tuned", "sent")}


def main() -> None:
    parser = options(__doc__.splitlines()[0], gb=0.5, rounds=3, space="6 times")
    parser.add_argument("--mbit", type=float, nargs="*", default=[1000.0], help="rates of shaped links (1000)")
    parser.add_argument("--latency-ms", type=float, default=20.0, help="their round trip (20)")
    parser.add_argument("--one", nargs=4, metavar=("URL", "DIRECTORY", "REPO", "WAY"), help="for the benchmark itself")
    args = parser.parse_args()
    if args.one:
        url, directory, repo, way = args.one
        push_one(url, Path(directory), repo, way)
        return
    result: dict[str, Any] = {"benchmark": "push", "time": int(time.time()), "gb": args.gb, "links": {}, "median": {}}
    with stoppable(), tempfile.TemporaryDirectory(dir=args.directory, prefix="push-") as root:
        for mbit in (None, *args.mbit):
            name = "loopback" if mbit is None else f"{mbit:g} Mbit/s"
            result["links"][name] = measure(name, mbit, args, Path(root))
            result["median"][name] = found = medians(result["links"][name])
            print(f"{name}: {', '.join(f'{key} {value:.2f}x' for key, value in found.items())} (whole / chunks)")
    print(f"written to {save(result, args.json)}")


if __name__ == "__main__":
    main()
