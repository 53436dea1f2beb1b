"""Names through the mount beside the same files in plain directories: open(), find, many small files, a new ref.

- ``open``: open(2) and close(2) of small files whose names the kernel knows, p50 and p99, beside the published
  directory's own files;
- ``find``: all models' files listed and stat'ed by find(1), first with nothing known to the kernel or the mount, then
  again, beside find over the published directories;
- ``small``: some files of every model read whole by 32 threads, first from the registry, then again: files a second;
  memory (RssAnon + RssShmem of the process that serves the mount, every 20 ms) is the highest of all up to here;
- first tensor of a model that the local tier has: the seconds from something being published to the first tensor's
  bytes, through the mount: ``push`` counts from the start of a `helios push` of the model under a new ref (so that the
  whole model is hashed), ``ref`` from asking the registry for one more ref, ``volume`` from asking the mount for a
  volume (what a pod's volume waits for).

    python -m benchmarks.metadata_ops [--models 100] [--files 200] [--gb 0.25] [--rounds 5] [--directory DIR]

Targets: ref and volume to first tensor < 100 ms; memory < 250 MB. ``--gb`` is the size of the model with tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.common import Sampler, options, save
from benchmarks.ingest import drop_cache, make_model
from benchmarks.plots import draw
from benchmarks.scene import helios, mounted, percentile, read_through, registry, stoppable, wait_until_whole, worker
from helios.home import Home
from helios.http.client import HttpClient
from helios.names import RepoId
from helios.publish import publish
from helios.registry_client import RegistryClient
from tests.support.mounts import Mount

PUSHERS = 8
READERS = 32
OPENS = 5000
SMALL = 400
"""Files that are read, over all models."""
TARGETS = {"first_tensor_s": 0.1, "memory_bytes": 250e6}
BIG = "tensors/model"


def make_files(directory: Path, models: int, files: int) -> list[Path]:
    """Models of small files, each of its own content; returns their directories."""
    out = []
    for model in range(models):
        path = directory / f"model-{model:03d}"
        path.mkdir(parents=True)
        for number in range(files):
            (path / f"part-{number:03d}.json").write_text(json.dumps({"model": model, "file": number}) * 20)
        out.append(path)
    return out


def push_all(url: str, directories: list[Path]) -> float:
    """Publish each as ``bench/<its name>``, a few at a time: their fsyncs share a disk's journal. Returns seconds."""

    def push(path: Path) -> None:
        with closing(HttpClient(url)) as http:
            publish(RegistryClient(http), path, RepoId.parse(f"bench/{path.name}"), "main")

    start = time.perf_counter()
    with ThreadPoolExecutor(PUSHERS) as pool:
        list(pool.map(push, directories))
    return time.perf_counter() - start


def opens(paths: list[Path]) -> list[float]:
    """Seconds of each of many open(2), one file after another; each was opened once before."""
    for path in paths:
        os.close(os.open(path, os.O_RDONLY))
    seconds: list[float] = []
    while len(seconds) < OPENS:
        for path in paths:
            start = time.perf_counter()
            fd = os.open(path, os.O_RDONLY)
            seconds.append(time.perf_counter() - start)
            os.close(fd)
    return seconds


def find(directory: Path, expected: int) -> float:
    """Seconds of find(1) that looks at every file's attributes."""
    start = time.perf_counter()
    command = ["find", str(directory), "-type", "f", "-size", "-1000k", "-printf", "."]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600)
    seconds = time.perf_counter() - start
    if len(done.stdout) != expected:
        raise SystemExit(f"find saw {len(done.stdout)} of {expected} files in {directory}")
    return seconds


def read_all(paths: Iterable[Path]) -> float:
    """Seconds until 32 threads have read every file."""
    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        if not all(pool.map(lambda path: len(path.read_bytes()), paths)):
            raise SystemExit("a file was empty")
    return time.perf_counter() - start


def first_tensor(path: Path) -> bytes:
    """The first tensor's bytes of a safetensors file: length of the header, header, tensor."""
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        start, end = min(tensor["data_offsets"] for tensor in header.values())
        file.seek(8 + length + start)
        data = file.read(end - start)
    if len(data) != end - start:
        raise SystemExit(f"the first tensor of {path} is {len(data)} bytes long instead of {end - start}")
    return data


def to_first_tensor(home: Home, mount: Mount, model: Path, url: str, number: int) -> dict[str, float]:
    """Seconds from each way of publishing to the first tensor; the local tier has the file, the kernel no page."""
    want = first_tensor(model)
    row = {}

    def seen(path: Path, start: float) -> float:
        data = first_tensor(path)
        seconds = time.perf_counter() - start
        if data != want:
            raise SystemExit(f"{path} has another first tensor than was published")
        drop_cache([path])
        return seconds

    start = time.perf_counter()
    helios(home, "push", model.parent, f"{BIG}@push-{number}")
    row["pushed_s"] = time.perf_counter() - start
    row["push_s"] = seen(mount.path / BIG / f"@push-{number}" / model.name, start)
    return row | {f"{way}_s": seconds for way, seconds in published(mount, model, url, f"ref-{number}", seen).items()}


def published(
    mount: Mount, model: Path, url: str, revision: str, seen: Callable[[Path, float], float]
) -> dict[str, float]:
    """Seconds from a new ref, and from a new volume, to the first tensor; ``seen`` reads it and ends the time."""
    row, name = {}, model.name
    with closing(HttpClient(url)) as http:
        client = RegistryClient(http)
        repo = RepoId.parse(BIG)
        commit = client.resolve(repo, "main").commit
        start = time.perf_counter()
        client.set_ref(repo, revision, commit, None)
        row["ref"] = seen(mount.path / BIG / f"@{revision}" / name, start)
    body = {"model": BIG, "revision": revision}
    with closing(HttpClient(f"unix:{mount.state['socket']}")) as http:
        start = time.perf_counter()
        http.bytes("PUT", f"/api/v1/volumes/{revision}", body=body)
        row["volume"] = seen(mount.path / ".volumes" / revision / "model" / name, start)
    return row


def small_files(mount: Mount, plain: Path, models: list[Path], files: int, rounds: int) -> dict[str, Any]:
    """open, find and small reads, beside the plain directories; median seconds."""
    expected = len(models) * files
    ours = mount.path / "bench"
    out: dict[str, Any] = {"find_first_s": find(ours, expected)}
    again = [(find(plain, expected), find(ours, expected)) for _ in range(rounds)]
    out["find_plain_s"], out["find_s"] = (statistics.median(column) for column in zip(*again, strict=True))
    names = sorted(path.name for path in models[0].iterdir())
    some = [(model, name) for model in models for name in names[: max(1, SMALL // len(models))]]
    out["small_files"] = len(some)
    out["small_s"] = read_all(ours / model.name / "@main" / name for model, name in some)
    out["small_again_s"] = read_all(ours / model.name / "@main" / name for model, name in some)
    out["small_plain_s"] = read_all(model / name for model, name in some)
    commit = (ours / models[0].name / "@main").resolve()
    samples: dict[str, list[float]] = {"plain": [], "mount": []}
    for _ in range(rounds):
        samples["plain"] += opens([models[0] / name for name in names])
        samples["mount"] += opens([commit / name for name in names])
    for name, seconds in samples.items():
        out[f"open_{name}_p50_s"], out[f"open_{name}_p99_s"] = percentile(seconds, 0.5), percentile(seconds, 0.99)
    return out


def run(gigabytes: float, rounds: int, models: int, files: int, directory: Path) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-names-", dir=directory))
    home = Home(work / "home")
    try:
        plain = work / "plain"
        directories = make_files(plain, models, files)
        (big,) = make_model(work / "big", int(gigabytes * 1e9), 1)
        with registry(home) as url:
            print(f"publishing {models} models", file=sys.stderr)
            pushes_s = push_all(url, directories)
            helios(home, "push", big.parent, BIG)
            with mounted(home, work / "mnt") as mount:
                sampler = Sampler(worker(mount))
                result = small_files(mount, plain, directories, files, rounds)
                result["memory_bytes"], result["pushes_s"] = sampler.stop(), pushes_s
                first = mount.path / BIG / "@main" / big.name
                read_through(first)
                wait_until_whole(first)
                drop_cache([first])
                rows = [to_first_tensor(home, mount, big, url, number) for number in range(rounds)]
                result |= {"mode": mount.state["mode"], "first_tensor": rows}
        result["median"] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        return {"benchmark": "metadata_ops", "models": models, "files": files, "time": int(time.time()), **result}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def show(result: dict[str, Any]) -> None:
    print(f"mode {result['mode']}; {result['models']} models x {result['files']} files")
    print(f"{'':16}{'plain':>10}{'mount':>10}{'mount, first':>14}")
    for part in ("p50", "p99"):
        plain, ours = result[f"open_plain_{part}_s"] * 1e6, result[f"open_mount_{part}_s"] * 1e6
        print(f"{'open ' + part + ' us':16}{plain:10.1f}{ours:10.1f}")
    print(f"{'find s':16}{result['find_plain_s']:10.3f}{result['find_s']:10.3f}{result['find_first_s']:14.3f}")
    rates = [result["small_files"] / result[key] for key in ("small_plain_s", "small_again_s", "small_s")]
    print(f"{'small files/s':16}{rates[0]:10.0f}{rates[1]:10.0f}{rates[2]:14.0f}")
    print(f"memory {result['memory_bytes'] / 1e6:.0f} MB (target {TARGETS['memory_bytes'] / 1e6:.0f} MB)")
    cells = ", ".join(f"{key.removesuffix('_s')} {value * 1000:.0f} ms" for key, value in result["median"].items())
    print(f"to the first tensor: {cells} (target for ref and volume: {TARGETS['first_tensor_s'] * 1000:.0f} ms)")


def main() -> None:
    parser = options("Measure names through the mount beside plain directories.", gb=0.25, rounds=5, space="3x")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--files", type=int, default=200, help="small files of each (200)")
    args = parser.parse_args()
    with stoppable():
        result = run(args.gb, args.rounds, args.models, args.files, args.directory.resolve())
    show(result)
    out = save(result, args.json)
    micro = {
        f"open {part}": {name: result[f"open_{name}_{part}_s"] * 1e6 for name in ("plain", "mount")}
        for part in ("p50", "p99")
    }
    draw(out, "open(2), warm", "microseconds", micro)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
