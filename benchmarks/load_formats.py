"""Getting a model's tensors in the ways that vLLM has: ours beside safetensors' strategies and runai_streamer.

Each load is a process of its own that gets tensors as the loader does inside vLLM, without the engine around it, and
copies every one into a parameter that was made before, as vLLM's weight loaders do; on the GPU where there is one.

- ``helios``: ours (docs/loader.md): through heliosfs.client on the mount, as plain files beside it;
- ``lazy``, ``eager``, ``prefetch``: as vLLM's `--safetensors-load-strategy` has them;
- ``runai_streamer``: where the package runai-model-streamer is installed;
- ``fastsafetensors``: where that is installed (on the CPU as vLLM would use it, which does so for GPUs only).

States: ``cold``: the files (the plain ones; the local tier's and the mount's) are out of the page cache; ``warm``: they
are in it. The local tier has the model whole. ``empty``: the mount has nothing yet, and the registry on loopback sends
everything (only for the mount). Which loader comes first changes from round to round.

    python -m benchmarks.load_formats [--gb 1] [--rounds 3] [--way NAME ...] [--no-empty] [--directory DIR]

Needs torch and safetensors. Target: in each state, the best of the others' time or less (ratio >= 0.95x).
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from benchmarks.common import ROOT, BackedMemory, options, save
from benchmarks.ingest import drop_cache, make_model
from benchmarks.plots import draw
from benchmarks.safetensors_load import read_ahead
from benchmarks.scene import helios, local_file, mounted, read_through, registry, stoppable, wait_until_whole
from helios.config import load as settings
from helios.home import Home

OURS: Final = "helios"
STRATEGIES: Final = ("lazy", "eager", "prefetch")
PACKAGES: Final = {"runai_streamer": "runai_model_streamer", "fastsafetensors": "fastsafetensors"}
SHARDS: Final = 4
MODEL: Final = "bench/model"
TARGET: Final = 0.95
CHILD_S: Final = 900.0


def ways() -> list[str]:
    """The loaders that can run here."""
    found = [OURS, *STRATEGIES]
    if find_spec(PACKAGES["runai_streamer"]):
        found.append("runai_streamer")
    if find_spec(PACKAGES["fastsafetensors"]):
        found.append("fastsafetensors")
    return found


def tensors(way: str, directory: Path) -> Iterator[tuple[str, Any]]:
    """What the loader hands to the model."""
    files = sorted(directory.glob("*.safetensors"))
    if way == OURS:
        yield from helios_format(directory)
    elif way == "runai_streamer":
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in files])
            for name, tensor in streamer.get_tensors():
                yield name, tensor.clone()  # as vLLM does: the streamer uses the memory again
    elif way == "fastsafetensors":
        yield from fastsafetensors([str(path) for path in files])
    elif way == "eager":
        from safetensors.torch import load

        for path in files:
            yield from load(path.read_bytes()).items()
    else:
        if way == "prefetch":
            read_ahead(files)
        from safetensors import safe_open

        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)


def fastsafetensors(files: list[str]) -> Iterator[tuple[str, Any]]:
    """As vLLM's iterator uses it, which has no place for a device but a GPU; so the CPU's is put together here."""
    import torch
    from fastsafetensors import SingleGroup
    from fastsafetensors.parallel_loader import ParallelLoader

    place = "cuda:0" if torch.cuda.is_available() else "cpu"
    loader = ParallelLoader(
        pg=SingleGroup(), hf_weights_files=files, use_tqdm_on_load=False, device=place, nogds=place == "cpu"
    )
    try:
        yield from loader.iterate_weights()
    finally:
        loader.close()


def helios_format(directory: Path) -> Iterator[tuple[str, Any]]:
    """Ours, as its loader for vLLM uses it."""
    import torch

    from heliosfs.loader.cuda import Cuda
    from heliosfs.loader.folders import open_folder
    from heliosfs.loader.load import load_tensors

    device = Cuda(torch.cuda.current_device()) if torch.cuda.is_available() else None
    with open_folder(str(directory)) as folder:
        yield from load_tensors(folder, settings(os.environ).loader, device=device)


def child(way: str, directory: Path, plain: Path) -> None:
    """The measured process: prints its seconds, bytes, CPU seconds and peak memory (in bytes, with what it has mapped)
    as JSON. ``plain`` tells the shapes: looking into ``directory`` would begin to fetch."""
    import torch
    from safetensors import safe_open

    if way in PACKAGES:  # what is imported is no part of the load
        importlib.import_module(PACKAGES[way])
    else:
        importlib.import_module("heliosfs.loader.folders")
        importlib.import_module("heliosfs.loader.load")
        settings(os.environ)  # nor is what vLLM's loader is made of

    place = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = {}
    for path in sorted(plain.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                # Written once, so that no loader pays for the parameter's pages.
                parameters[name] = torch.zeros(part.get_shape(), dtype=torch.bfloat16, device=place)
    done = 0
    cpu, start = time.process_time(), time.perf_counter()
    for name, tensor in tensors(way, directory):
        parameters[name].copy_(tensor)
        done += tensor.nbytes
    if place == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    row = {"seconds": seconds, "bytes": done, "cpu_s": time.process_time() - cpu}
    print(json.dumps(row | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}))


def run_child(way: str, directory: Path, plain: Path, total: int, environ: dict[str, str]) -> dict[str, float]:
    """One load in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load_formats", "--child", way, str(directory), str(plain)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, cwd=ROOT, check=True, timeout=CHILD_S, env={**os.environ, **environ}
    )
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if not 0 < total - row["bytes"] < 1 << 20:
        raise SystemExit(f"{way} loaded {row['bytes']} bytes of files of {total}")
    return row


class Scene:
    """The model in a plain directory and in a registry, and where what was measured goes."""

    def __init__(self, work: Path, plain: list[Path], url: str, store: list[Path], memory: BackedMemory) -> None:
        self.work, self.plain, self.url, self.store, self.memory = work, plain, url, store, memory
        self.total = sum(path.stat().st_size for path in plain)
        self.home = Home(work / "node")
        self.mode = ""

    def measure(self, way: str, directory: Path, behind: Sequence[Path], warm: bool) -> dict[str, float]:
        """One load with the files in the page cache, or out of it."""
        drop_cache(list(behind))
        self.memory.fill()
        if warm:
            for path in behind:
                read_through(path)
        environ = {"HELIOS_HOME": str(self.home.root), "HELIOS_REGISTRY__URLS": self.url}
        return run_child(way, directory, self.plain[0].parent, self.total, environ)

    def one_round(self, chosen: Sequence[str], empty: bool) -> dict[str, dict[str, dict[str, float]]]:
        """Rows by state and way."""
        rows: dict[str, dict[str, dict[str, float]]] = {}

        def note(state: str, way: str, row: dict[str, float]) -> None:
            rows.setdefault(state, {})[way] = row
            print(f"{state:12}{way:18}{row['seconds']:8.2f} s{row['cpu_s']:8.2f} CPU s", file=sys.stderr, flush=True)

        for way in chosen:
            for warm in (False, True):
                note(
                    f"plain_{'warm' if warm else 'cold'}",
                    way,
                    self.measure(way, self.plain[0].parent, self.plain, warm),
                )
        for way in chosen if empty else []:
            with self.mount() as ours:
                drop_cache(self.store)
                note("mount_empty", way, self.measure(way, ours[0].parent, [], False))
        with self.mount() as ours:
            for path in ours:
                read_through(path)
            for path in ours:
                wait_until_whole(path, 300)
            for way in chosen:
                for warm in (False, True):
                    behind = [*self.local, *ours]
                    note(f"mount_{'warm' if warm else 'cold'}", way, self.measure(way, ours[0].parent, behind, warm))
        return rows

    @property
    def local(self) -> list[Path]:
        return [local_file(self._mount, path) for path in self._ours]

    @contextmanager
    def mount(self) -> Iterator[list[Path]]:
        """A mount of a node that has nothing; yields the model's files in it."""
        try:
            with mounted(self.home, self.work / "mnt", urls=self.url) as mount:
                files = (mount.path / MODEL / "@main").resolve()
                self._mount, self._ours = mount, [files / path.name for path in self.plain]
                self.mode = str(mount.state["mode"])
                yield self._ours
        finally:
            shutil.rmtree(self.home.root, ignore_errors=True)


def run(gigabytes: float, rounds: int, chosen: Sequence[str], empty: bool, directory: Path) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-formats-", dir=directory))
    memory, home = BackedMemory(directory), Home(work / "home")
    try:
        print(f"making {gigabytes:g} GB under {work}", file=sys.stderr)
        plain = make_model(work / "model", int(gigabytes * 1e9), SHARDS)
        os.sync()
        with registry(home) as url:
            helios(home, "push", work / "model", MODEL)
            store = [path for path in home.store.rglob("*") if path.is_file()]
            scene = Scene(work, plain, url, store, memory)
            measured = [
                scene.one_round(list(chosen) if number % 2 else list(reversed(chosen)), empty)
                for number in range(rounds)
            ]
        states = list(measured[0])
        seconds = {
            state: {way: statistics.median(row[state][way]["seconds"] for row in measured) for way in chosen}
            for state in states
        }
        others = {state: min(s for way, s in row.items() if way != OURS) for state, row in seconds.items()}
        return {
            "benchmark": "load_formats",
            "bytes": scene.total,
            "shards": len(plain),
            "mode": scene.mode,
            "rounds": measured,
            "seconds": seconds,
            "cpu_s": {
                state: {way: statistics.median(row[state][way]["cpu_s"] for row in measured) for way in chosen}
                for state in states
            },
            "peak": {way: max(row[state][way]["peak"] for row in measured for state in states) for way in chosen},
            "median": {state: others[state] / seconds[state][OURS] for state in states},
            "time": int(time.time()),
        }
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Measure loaders of safetensors on the mount and on the disk.", gb=1, rounds=3, space="4x")
    parser.add_argument("--way", action="append", help="only ours and this one; may be given again")
    parser.add_argument("--no-empty", action="store_true", help="leave out the mount that has nothing yet")
    parser.add_argument("--child", nargs=3, help="the measured process: WAY DIRECTORY PLAIN; for this benchmark itself")
    args = parser.parse_args()
    if gone := [name for name in ("torch", "safetensors") if find_spec(name) is None]:
        parser.error(f"this needs {' and '.join(gone)}: pip install {' '.join(gone)}")
    if args.child:
        child(args.child[0], *map(Path, args.child[1:]))
        return
    chosen = [way for way in ways() if args.way is None or way == OURS or way in args.way]
    if len(chosen) < 2:
        parser.error(f"choose among {', '.join(ways()[1:])}")
    with stoppable():
        result = run(args.gb, args.rounds, chosen, not args.no_empty, args.directory.resolve())
    seconds, gb = result["seconds"], result["bytes"] / 1e9
    print(f"{gb:.2f} GB in {result['shards']} shards, mode {result['mode']}; median seconds (CPU seconds)")
    print(f"{'':14}" + "".join(f"{way:>20}" for way in chosen) + f"{'best other / ours':>20}")
    for state, row in seconds.items():
        cells = "".join(f"{row[way]:12.2f} ({result['cpu_s'][state][way]:5.2f})" for way in chosen)
        print(f"{state:14}{cells}{result['median'][state]:19.2f}x")
    print("peak memory, GB: " + ", ".join(f"{way} {peak / 1e9:.2f}" for way, peak in result["peak"].items()))
    print(f"target: {TARGET}x in each state")
    out = save(result, args.json)
    draw(
        out,
        "Loading safetensors into parameters",
        "GB/s",
        {s: {w: gb / t for w, t in r.items()} for s, r in seconds.items()},
    )
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
