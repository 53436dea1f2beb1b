"""Loading a safetensors model through the mount, beside the same files in a plain directory.

Ways, as vLLM's `--safetensors-load-strategy` has them; each load is a process of its own that copies every tensor into
one buffer used over and over, as a loader copies into its parameters; the buffer is on the GPU where there is one:

- ``mmap``: safetensors' safe_open, pages as they are touched, shard after shard;
- ``eager``: each shard read whole with read(2), then taken apart;
- ``prefetch``: 8 threads read 16 MiB blocks of all shards while the mmap loader runs.

``cold``: the files (the plain ones; the local tier's and the mount's) are taken out of the page cache before; ``warm``:
they are in it, and for the mount also what the kernel kept of the mount itself. The local tier has the model whole.
Which of the two comes first changes from round to round. ``CPU``: the loader's CPU seconds beside those on the plain
directory, which say more on a busy machine.

    python -m benchmarks.safetensors_load [--gb 2] [--rounds 3] [--directory DIR]

Needs torch and safetensors. Target: >= 0.95x of the plain directory, warm and cold.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, BackedMemory, options, save
from benchmarks.ingest import drop_cache, make_model
from benchmarks.plots import draw
from benchmarks.scene import helios, local_file, mounted, read_through, reads, stoppable, wait_until_whole
from helios.home import Home
from tests.support.mounts import Mount

SHARDS = 4
BLOCK, THREADS = 16 << 20, 8
MODEL = "bench/model"
TARGET = 0.95


def lazy(paths: list[Path]) -> int:
    """The mmap loader; returns the bytes copied."""
    import torch
    from safetensors import safe_open

    target = torch.empty(0, dtype=torch.bfloat16, device=_device())
    done = 0
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                target, count = _copy(target, file.get_tensor(name))
                done += count
    return done


def eager(paths: list[Path]) -> int:
    """The loader that reads shards whole; returns the bytes copied."""
    import torch
    from safetensors.torch import load

    target = torch.empty(0, dtype=torch.bfloat16, device=_device())
    done = 0
    for path in paths:
        for tensor in load(path.read_bytes()).values():
            target, count = _copy(target, tensor)
            done += count
    return done


def prefetch(paths: list[Path]) -> int:
    """The mmap loader while threads read ahead of it; returns the bytes copied."""
    threads = read_ahead(paths)
    done = lazy(paths)
    for thread in threads:
        thread.join()
    return done


def read_ahead(paths: Sequence[Path]) -> list[threading.Thread]:
    """Threads that read blocks of all files into the page cache, started."""
    blocks = iter([(path, start) for path in paths for start in range(0, path.stat().st_size, BLOCK)])
    lock = threading.Lock()

    def ahead() -> None:
        buffer = bytearray(BLOCK)
        while True:
            with lock:
                path, start = next(blocks, (None, 0))
            if path is None:
                return
            with path.open("rb", buffering=0) as file:
                os.preadv(file.fileno(), [buffer], start)

    threads = [threading.Thread(target=ahead, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    return threads


def _device() -> str:
    """Where the buffer is: on the GPU, if there is one. Copies from pageable memory to it end before they return."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _copy(target: Any, tensor: Any) -> tuple[Any, int]:
    import torch

    if target.numel() < tensor.numel():
        target = torch.empty(tensor.numel(), dtype=tensor.dtype, device=target.device)
    target[: tensor.numel()].copy_(tensor.reshape(-1))
    return target, tensor.numel() * tensor.element_size()


WAYS: dict[str, Callable[[list[Path]], int]] = {"mmap": lazy, "eager": eager, "prefetch": prefetch}


def child(way: str, paths: list[Path]) -> None:
    """The measured process: prints its seconds, bytes and CPU seconds as JSON."""
    import safetensors.torch  # noqa: F401  # torch's own start is not a part of the load

    cpu, start = time.process_time(), time.perf_counter()
    done = WAYS[way](paths)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": done, "cpu_s": time.process_time() - cpu}))


def load(way: str, paths: list[Path], total: int) -> tuple[float, float]:
    """Seconds and CPU seconds of one load in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.safetensors_load", "--child", way, *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True, timeout=900)
    row = json.loads(done.stdout)
    if not 0 < total - row["bytes"] < 1 << 20:
        raise SystemExit(f"{way} loaded {row['bytes']} bytes of files of {total}")
    return float(row["seconds"]), float(row["cpu_s"])


def one_round(
    mount: Mount, plain: list[Path], ours: list[Path], total: int, memory: BackedMemory, number: int
) -> dict[str, float]:
    row: dict[str, float] = {}
    local = [local_file(mount, path) for path in ours]
    before = reads(mount)
    sides = [("plain", plain, plain), ("mount", ours, [*local, *ours])]
    for way in WAYS:
        for name, paths, behind in sides if number % 2 else reversed(sides):
            drop_cache(behind)
            memory.fill()
            row[f"{way}_cold_{name}_s"], row[f"{way}_cold_{name}_cpu_s"] = load(way, paths, total)
            for path in [*behind, *paths]:
                read_through(path)
            row[f"{way}_warm_{name}_s"], row[f"{way}_warm_{name}_cpu_s"] = load(way, paths, total)
        for state in ("cold", "warm"):
            plain_s, ours_s = row[f"{way}_{state}_plain_s"], row[f"{way}_{state}_mount_s"]
            row[f"{way}_{state}"] = plain_s / ours_s
            cpu = row[f"{way}_{state}_cpu"] = row[f"{way}_{state}_mount_cpu_s"] / row[f"{way}_{state}_plain_cpu_s"]
            rates = f"{total / 1e9 / plain_s:9.2f}{total / 1e9 / ours_s:9.2f}"
            print(f"{way:10}{state:6}{rates}{row[f'{way}_{state}']:9.2f}{cpu:9.2f}", flush=True)
    row["reads"] = reads(mount) - before
    return row


def run(gigabytes: float, rounds: int, directory: Path) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-load-", dir=directory))
    memory, home = BackedMemory(directory), Home(work / "home")
    try:
        print(f"making {gigabytes:g} GB under {work}", file=sys.stderr)
        plain = make_model(work / "model", int(gigabytes * 1e9), SHARDS)
        total = sum(path.stat().st_size for path in plain)
        helios(home, "push", work / "model", MODEL)
        with mounted(home, work / "mnt") as mount:
            ours = [mount.path / MODEL / "@main" / path.name for path in plain]
            for path in ours:
                read_through(path)
            for path in ours:
                wait_until_whole(path)
            print(f"mode {mount.state['mode']} ({mount.state['reason']})")
            print(f"{'GB/s':16}{'plain':>9}{'mount':>9}{'ratio':>9}{'CPU':>9}")
            measured = [one_round(mount, plain, ours, total, memory, number) for number in range(rounds)]
            mode = mount.state["mode"]
        median = {key: statistics.median(row[key] for row in measured) for key in measured[0]}
        return {
            "benchmark": "safetensors_load",
            "bytes": total,
            "mode": mode,
            "rounds": measured,
            "median": median,
            "time": int(time.time()),
        }
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Measure loads of a safetensors model through the mount.", gb=2, rounds=3, space="3x")
    parser.add_argument("--child", nargs="+", help="the measured process: WAY FILE ...; for this benchmark itself")
    args = parser.parse_args()
    if gone := [name for name in ("torch", "safetensors") if find_spec(name) is None]:
        parser.error(f"this needs {' and '.join(gone)}: pip install {' '.join(gone)}")
    if args.child:
        child(args.child[0], [Path(path) for path in args.child[1:]])
        return
    with stoppable():
        result = run(args.gb, args.rounds, args.directory.resolve())
    out = save(result, args.json)
    gb, median = result["bytes"] / 1e9, result["median"]
    keys = [f"{way}_{state}" for state in ("cold", "warm") for way in WAYS]
    draw(
        out,
        "Loading safetensors",
        "GB/s",
        {key: {name: gb / median[f"{key}_{name}_s"] for name in ("plain", "mount")} for key in keys},
    )
    print("  ".join(f"{key} {median[key]:.2f}x (CPU {median[f'{key}_cpu']:.2f}x)" for key in keys))
    print(f"target {TARGET}x; {median['reads']:.0f} READs in Python a round; written to {out}")


if __name__ == "__main__":
    main()
