"""What compression and deduplication save: by type of weights, and for a base model with its relatives.

- ``types``: chunks of 4 MiB of each type: the share saved, and MB/s of CPU time on one core to encode and to decode, as
  the registry's job does it (it tries samples and takes the best codec; what it writes it decodes and hashes as well,
  which is not in here), beside zstd at level 3 on the same bytes;
- ``models``: a base model, fine-tunes of it and quantised forms are pushed to a real registry one after another, and
  compressed: bytes of each by ``helios usage`` before and after, where what models share is divided among them.

The weights are made up: normally distributed, with a spread of its own for every row, as layers of trained models have
them. Zeros and repetitions, which real files also hold, are missing, so that real models save a little more.

    python -m benchmarks.compression [--gb 0.5] [--rounds 3] [--directory DIR]

Target: half-precision weights (BF16) take at least 25% less.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import zstandard

from benchmarks.common import options, save
from benchmarks.scene import helios, registry, run_in
from helios.home import Home
from heliosfs.store import codec
from registry.gc import gain
from tests.support.weights import float8, model

CHUNK = 4 << 20
TARGETS = {"bf16_saved": 0.25}
AT_ONCE = {
    "HELIOS_REGISTRY__GC_GRACE_S": "0.5",
    "HELIOS_REGISTRY__GC_EVERY_S": "0",
    "HELIOS_REGISTRY__LEASE_S": "1",
    "HELIOS_REGISTRY__RECOMPRESS_MB_S": "0",
    "HELIOS_REGISTRY__RECOMPRESS_AFTER_S": "0",
    "HELIOS_REGISTRY__XET": "false",
}
COLUMNS = 2048
"""Length of a row of weights."""


def weights(count: int, seed: int) -> np.ndarray:
    """Weights as float32, in rows with spreads of their own around 0.02."""
    rng = np.random.default_rng(seed)
    rows = -(-count // COLUMNS)
    spread = np.float32(0.02) * np.exp(rng.standard_normal((rows, 1), np.float32) * np.float32(0.3))
    return (rng.standard_normal((rows, COLUMNS), np.float32) * spread).reshape(-1)[:count]


def bf16(values: np.ndarray) -> bytes:
    """Rounded to nearest, ties to even, as converters do it."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def quantised(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> bytes:
    return gguf.quants.quantize(values.reshape(-1, COLUMNS), kind).tobytes()


TYPES: dict[str, Callable[[np.ndarray], bytes]] = {
    "BF16": bf16,
    "F16": lambda values: values.astype(np.float16).tobytes(),
    "F32": lambda values: values.tobytes(),
    "F8_E4M3": lambda values: float8(values * 64).tobytes(),
    "GGUF Q8_0": lambda values: quantised(values, gguf.GGMLQuantizationType.Q8_0),
    "GGUF Q4_0": lambda values: quantised(values, gguf.GGMLQuantizationType.Q4_0),
}


def chunks_of(make: Callable[[np.ndarray], bytes], size: int) -> list[bytes]:
    """Whole chunks of one type: at least one, and no more than ``size`` bytes need."""
    data, seed = bytearray(), 0
    while len(data) < max(size, CHUNK):
        data += make(weights(CHUNK, seed))
        seed += 1
    return [bytes(data[start : start + CHUNK]) for start in range(0, max(size, CHUNK) // CHUNK * CHUNK, CHUNK)]


def timed(calls: list[Callable[[], object]]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    for call in calls:
        call()
    return time.process_time() - start


def measure_type(name: str, size: int, rounds: int) -> dict[str, Any]:
    chunks = chunks_of(TYPES[name], size)
    total = sum(map(len, chunks))
    stored = [gain.encode(chunk) for chunk in chunks]
    plain = [zstandard.ZstdCompressor(level=3).compress(chunk) for chunk in chunks]

    def row(encode: list[Callable[[], object]], decode: list[Callable[[], object]], length: int) -> dict[str, float]:
        encoding = statistics.median(timed(encode) for _ in range(rounds))
        decoding = statistics.median(timed(decode) for _ in range(rounds))
        return {
            "saved": 1 - length / total,
            "encode_mb_s": total / encoding / 1e6,
            "decode_mb_s": total / decoding / 1e6,
        }

    ours = row(
        [lambda chunk=chunk: gain.encode(chunk) for chunk in chunks],  # type: ignore[misc]
        [lambda s=s: codec.decode(s[0], memoryview(s[1]), CHUNK) for s in stored],  # type: ignore[misc]
        sum(len(data) for _, data in stored),
    )
    zstd = row(
        [lambda chunk=chunk: zstandard.ZstdCompressor(level=3).compress(chunk) for chunk in chunks],  # type: ignore[misc]
        [lambda data=data: zstandard.ZstdDecompressor().decompress(data) for data in plain],  # type: ignore[misc]
        sum(map(len, plain)),
    )
    return {"codec": stored[0][0], "bytes": total, "ours": ours, "zstd": zstd}


# --- a family of models ---


def layers(size: int) -> int:
    """How many layers of 8 MiB in BF16 a model of ``size`` bytes has."""
    return max(2, size // (8 << 20))


def base_layers(count: int, changed: Callable[[int, np.ndarray], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for number in range(count):
        yield f"model.layers.{number}.weight", changed(number, weights(4 << 20, 1000 + number))


def nudge(values: np.ndarray, seed: int) -> np.ndarray:
    """As training goes on: every weight moves a little."""
    return values + np.random.default_rng(seed).standard_normal(values.shape, np.float32) * np.float32(0.001)


def family(directory: Path, count: int) -> Iterator[tuple[str, Path]]:
    """The models, in the order in which they are published; each directory is gone when the next one is made."""

    def safetensors(name: str, dtype: str, changed: Callable[[int, np.ndarray], np.ndarray]) -> tuple[str, Path]:
        place = directory / name
        place.mkdir()
        make = TYPES[dtype]
        tensors = {key: (dtype, make(values)) for key, values in base_layers(count, changed)}
        (place / "model.safetensors").write_bytes(model(tensors))
        return name, place

    def as_gguf(name: str, kind: gguf.GGMLQuantizationType) -> tuple[str, Path]:
        place = directory / name
        place.mkdir()
        writer = gguf.GGUFWriter(place / "model.gguf", "llama")
        for key, values in base_layers(count, lambda _n, values: values):
            rows = gguf.quants.quantize(values.reshape(-1, COLUMNS), kind)
            writer.add_tensor(key, rows, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return name, place

    makers: list[Callable[[], tuple[str, Path]]] = [
        lambda: safetensors("base", "BF16", lambda _n, values: values),
        lambda: safetensors("tuned-last-quarter", "BF16", lambda n, v: nudge(v, n) if n >= count * 3 // 4 else v),
        lambda: safetensors("tuned-all", "BF16", lambda n, values: nudge(values, 50 + n)),
        lambda: safetensors("float8", "F8_E4M3", lambda _n, values: values),
        lambda: as_gguf("gguf-q8", gguf.GGMLQuantizationType.Q8_0),
        lambda: as_gguf("gguf-q4", gguf.GGMLQuantizationType.Q4_0),
    ]
    for make in makers:
        name, place = make()
        yield name, place
        shutil.rmtree(place)


def measure_models(directory: Path, size: int) -> dict[str, Any]:
    home = Home(directory / "home")
    rows: list[dict[str, Any]] = []

    def usage() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(helios(home, "usage", "--json"))
        return found

    with registry(home, environ=AT_ONCE):
        last = 0
        for name, place in family(directory, layers(size)):
            digest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.iterdir()}
            helios(home, "push", place, f"bench/{name}")
            total = usage()["total"]["stored"]
            rows.append({"model": name, "new": total - last, "files": digest})
            last = total
        before = usage()
        start = time.perf_counter()
        report = json.loads(helios(home, "store", "compress", "--unread-for", "0", "--json"))
        seconds = time.perf_counter() - start
        time.sleep(1.6)
        helios(home, "gc", "--json")
        after = usage()
        check(home, directory, rows)
    for row in rows:
        for when, told in (("before", before), ("after", after)):
            [found] = [repo for repo in told["repos"] if repo["repo"] == f"models/bench/{row['model']}"]
            row |= {"logical": found["logical"], f"stored_{when}": found["stored"]}
    total = {
        "logical": after["total"]["logical"],
        "before": before["total"]["stored"],
        "after": after["total"]["stored"],
    }
    return {"rows": rows, "total": total, "report": report, "compress_mb_s": report["before"] / seconds / 1e6}


def check(home: Home, directory: Path, rows: list[dict[str, Any]]) -> None:
    """Every file still has its hash."""
    for row in rows:
        place = directory / "read"
        helios(home, "bundle", "export", place, f"bench/{row['model']}")
        wanted = set(row["files"].values())
        with tarfile.open(place) as bundle:
            for member in bundle:
                if member.name.startswith("blobs/"):
                    file = bundle.extractfile(member)
                    assert file is not None
                    wanted.discard(hashlib.file_digest(file, "sha256").hexdigest())
        place.unlink()
        if wanted:
            raise SystemExit(f"{row['model']} is not what was pushed")


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    size = int(arguments.gb * 1e9)
    types = {name: measure_type(name, min(size // 4, 64 << 20), arguments.rounds) for name in TYPES}
    models = measure_models(directory, size // 4)
    median = {
        "bf16_saved": types["BF16"]["ours"]["saved"],
        "bf16_decode_mb_s": types["BF16"]["ours"]["decode_mb_s"],
        "stored_share": models["total"]["after"] / models["total"]["logical"],
    }
    return {
        "benchmark": "compression",
        "time": time.strftime("%Y%m%d-%H%M%S"),
        "gb": arguments.gb,
        "cores": os.cpu_count(),
        "types": types,
        "models": models,
        "median": median,
        "targets": TARGETS,
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{'':12}{'codec':14}{'saved':>7}{'encode':>9}{'decode':>9}   {'zstd':>8}{'encode':>9}{'decode':>9}  CPU MB/s"
    )
    for name, row in result["types"].items():
        ours, zstd = row["ours"], row["zstd"]
        print(
            f"{name:12}{row['codec']:14}{ours['saved']:>7.1%}{ours['encode_mb_s']:>9.0f}{ours['decode_mb_s']:>9.0f}   "
            f"{zstd['saved']:>8.1%}{zstd['encode_mb_s']:>9.0f}{zstd['decode_mb_s']:>9.0f}"
        )
    models = result["models"]
    print(f"\n{'MB':22}{'logical':>9}{'new':>9}{'stored':>9}{'compressed':>12}{'of logical':>12}")
    for row in models["rows"]:
        print(
            f"{row['model']:22}{row['logical'] / 1e6:>9.1f}{row['new'] / 1e6:>9.1f}{row['stored_before'] / 1e6:>9.1f}"
            f"{row['stored_after'] / 1e6:>12.1f}{row['stored_after'] / row['logical']:>12.1%}"
        )
    total = models["total"]
    print(
        f"{'total':22}{total['logical'] / 1e6:>9.1f}{'':9}{total['before'] / 1e6:>9.1f}{total['after'] / 1e6:>12.1f}"
        f"{total['after'] / total['logical']:>12.1%}"
    )
    print(f"compressed at {models['compress_mb_s']:.0f} MB/s")


def main() -> int:
    parser = options(__doc__.splitlines()[0], gb=0.5, rounds=3, space="three times")
    arguments = parser.parse_args()
    with run_in(arguments.directory, "compression") as directory:
        result = measure(arguments, directory)
    show(result)
    print(save(result, arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
