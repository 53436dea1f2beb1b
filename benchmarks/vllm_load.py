"""vLLM loading a model through the mount, with each of its strategies, beside the same files on the disk.

A random Llama in several shards; each load is a real vLLM of its own (offline engine, CPU or GPU, as installed) that is
ended as soon as it has logged how long the weights took. Ways are vLLM's `--safetensors-load-strategy`: ``default``
(not given: vLLM chooses by the filesystem), ``lazy`` (page faults, shard after shard), ``eager`` (each shard by one
read), ``prefetch`` (8 threads read ahead).

- ``cold``: the mount has nothing; the registry, on loopback, sends everything, the store's files not in the page cache;
- ``disk``: the local tier has the model whole, and the page cache nothing of it;
- ``warm``: the page cache has it too.

The yardstick is a plain directory on the same disk: out of the page cache for the first two, in it for the third.

    python -m benchmarks.vllm_load [--gb 3] [--rounds 2] [--strategy NAME ...] [--directory DIR]

Needs vLLM. Targets: disk and warm >= 0.95x of the plain directory, cold >= 0.3x.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from benchmarks.common import ROOT, BackedMemory, options, save
from benchmarks.ingest import drop_cache
from benchmarks.plots import draw
from benchmarks.scene import helios, local_file, mounted, read_through, registry, stoppable, wait_until_whole
from helios.home import Home
from helios.launch.tiny_model import TinyShape, write_model

WAYS: Final = ("default", "lazy", "eager", "prefetch")
STATES: Final = {"cold": "disk", "disk": "disk", "warm": "warm"}
"""How the mount is, and how the plain directory is beside it."""
TARGETS: Final = {"cold": 0.3, "disk": 0.95, "warm": 0.95}
MODEL: Final = "bench/llama"
HIDDEN, INTERMEDIATE = 2048, 5632
LAYER_BYTES: Final = 2 * (2 * HIDDEN * HIDDEN + HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
START_S: Final = 300.0
"""How long one vLLM may take until it has loaded, in seconds."""

SAID = re.compile(r"Loading weights took ([\d.]+) seconds")


def make_llama(directory: Path, total: int) -> list[Path]:
    """Write the model; returns its shards."""
    directory.mkdir()
    layers = max(1, round(total / LAYER_BYTES))
    shape = TinyShape(
        hidden=HIDDEN,
        layers=layers,
        heads=16,
        kv_heads=8,
        intermediate=INTERMEDIATE,
        shard_bytes=-(-layers * LAYER_BYTES // 4),
    )
    write_model(directory, 0, shape)
    os.sync()
    return sorted(directory.glob("*.safetensors"))


def load(way: str, directory: Path, work: Path, memory: BackedMemory) -> float:
    """Seconds that a vLLM of its own takes for the weights, as it says itself."""
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(work / "vllm"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [sys.executable, "-m", "benchmarks.vllm_load", "--child", way, str(directory)]
    memory.fill()
    log = work / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environ, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    end = time.monotonic() + START_S
    try:
        while (said := SAID.search(log.read_text(errors="replace"))) is None:
            if process.poll() is not None or time.monotonic() > end:
                sys.stderr.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:]))
                raise SystemExit(f"vLLM did not load {directory} ({way})")
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return float(said[1])


def child(way: str, directory: str) -> None:
    """The measured process."""
    from vllm import LLM

    sizes = {"max_model_len": 128, "max_num_seqs": 1, "kv_cache_memory_bytes": 64 << 20}
    strategy = None if way == "default" else way
    LLM(model=directory, safetensors_load_strategy=strategy, enforce_eager=True, **sizes)


def one_way(
    way: str, plain: list[Path], url: str, store: list[Path], work: Path, memory: BackedMemory
) -> dict[str, float]:
    """Seconds of the plain directory, out of the page cache and in it, and of the mount in its three states."""
    row = {}
    drop_cache(plain)
    row["plain_disk"] = load(way, plain[0].parent, work, memory)
    for path in plain:
        read_through(path)
    row["plain_warm"] = load(way, plain[0].parent, work, memory)
    home = Home(work / "node")
    try:
        with mounted(home, work / "mnt", urls=url) as mount:
            files = (mount.path / MODEL / "@main").resolve()
            ours = [files / path.name for path in plain]
            drop_cache(store)
            row["mount_cold"] = load(way, files, work, memory)
            for path in ours:
                read_through(path)
                wait_until_whole(path, 120)
            local = [local_file(mount, path) for path in ours]
            drop_cache([*local, *ours])
            row["mount_disk"] = load(way, files, work, memory)
            for path in ours:
                read_through(path)
            row["mount_warm"] = load(way, files, work, memory)
            row["native"] = float(mount.state["mode"] == "native")
    finally:
        shutil.rmtree(home.root, ignore_errors=True)
    return row


def run(gigabytes: float, rounds: int, ways: Sequence[str], directory: Path) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-vllm-", dir=directory))
    memory, home = BackedMemory(directory), Home(work / "home")
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    try:
        print(f"making {gigabytes:g} GB under {work}", file=sys.stderr)
        plain = make_llama(work / "model", int(gigabytes * 1e9))
        total = sum(path.stat().st_size for path in plain)
        with registry(home) as url:
            helios(home, "push", work / "model", MODEL)
            store = [path for path in home.store.rglob("*") if path.is_file()]
            for _ in range(rounds):
                for way in ways:
                    row = one_way(way, plain, url, store, work, memory)
                    measured[way].append(row)
                    print(way, {key: value for key, value in row.items() if key != "native"}, file=sys.stderr)
        seconds = {
            way: {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "native"}
            for way, rows in measured.items()
        }
        ratios = {
            f"{way}_{state}": seconds[way][f"plain_{beside}"] / max(seconds[way][f"mount_{state}"], 0.01)
            for way in ways
            for state, beside in STATES.items()
        }
        return {
            "benchmark": "vllm_load",
            "bytes": total,
            "shards": len(plain),
            "mode": "native" if measured[ways[0]][0]["native"] else "portable",
            "rounds": measured,
            "seconds": seconds,
            "median": ratios,
            "time": int(time.time()),
        }
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Measure vLLM's loads through the mount.", gb=3, rounds=2, space="4x")
    parser.add_argument("--strategy", action="append", choices=WAYS, help="only this one; may be given again")
    parser.add_argument("--child", nargs=2, help="the measured process: WAY DIRECTORY; for this benchmark itself")
    args = parser.parse_args()
    if find_spec("vllm") is None:
        parser.error("this needs vLLM; `make setup` installs it")
    if args.child:
        child(*args.child)
        return
    with stoppable():
        result = run(args.gb, args.rounds, args.strategy or WAYS, args.directory.resolve())
    gb, seconds, ratios = result["bytes"] / 1e9, result["seconds"], result["median"]
    print(f"{gb:.2f} GB in {result['shards']} shards, mode {result['mode']}; seconds by vLLM's own account, median")
    print(f"{'strategy':10}{'plain':>16}{'mount':>24}{'plain / mount':>24}")
    print(f"{'':10}{'disk':>8}{'warm':>8}" + 2 * "".join(f"{state:>8}" for state in STATES))
    for way in seconds:
        row = seconds[way]
        cells = [row["plain_disk"], row["plain_warm"], *(row[f"mount_{state}"] for state in STATES)]
        print(f"{way:10}" + "".join(f"{v:8.2f}" for v in cells + [ratios[f"{way}_{state}"] for state in STATES]))
    best = {state: min(seconds, key=lambda way: seconds[way][f"mount_{state}"]) for state in STATES}
    print("fastest through the mount: " + ", ".join(f"{state} {way}" for state, way in best.items()))
    print("targets: " + ", ".join(f"{state} {target}x" for state, target in TARGETS.items()))
    out = save(result | {"best": best}, args.json)
    bars = {f"{way}, {key.replace('_', ' ')}": {"seconds": row[key]} for way, row in seconds.items() for key in row}
    draw(out, "vLLM loading weights", "s", bars)
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
