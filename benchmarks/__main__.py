"""Run the benchmarks, add their ratios to benchmarks/history.jsonl, and fail when one dropped.

    python -m benchmarks [NAME ...] [--quick]

Each benchmark prints its own table and writes JSON; here its ratios (ours / yardstick, both from the same run) are
compared with their target and with the median of the last runs of the same size on a machine with as many cores. A
ratio that is below its target is marked; one that is more than 30% below that median fails the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HISTORY = Path(__file__).parent / "history.jsonl"
DROP = 0.7
"""A ratio below this part of what it was fails."""
REMEMBERED = 10
"""How many earlier runs count."""


@dataclass(frozen=True)
class Benchmark:
    """``full`` and ``quick`` are its arguments; ``ratios`` reads its JSON; ``targets`` are what it should reach."""

    full: tuple[str, ...]
    quick: tuple[str, ...]
    ratios: Callable[[Mapping[str, Any]], dict[str, float]]
    targets: Mapping[str, float]


def median_of(*names: str) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    return lambda result: {name: float(result["median"][name]) for name in names}


WARM = tuple(f"{way}_{readers}" for way in ("seq", "rand4k", "rand1m", "mmap") for readers in (1, 8))
VLLM_TARGETS = {"cold": 0.3, "disk": 0.95, "warm": 0.95}
VLLM = tuple(f"{way}_{state}" for way in ("default", "lazy", "eager", "prefetch") for state in VLLM_TARGETS)
FORMATS = ("plain_cold", "plain_warm", "mount_empty", "mount_cold", "mount_warm")
LOADS = tuple(f"{way}_{state}" for way in ("mmap", "eager", "prefetch") for state in ("cold", "warm"))


def cold_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """Throughput to the bare client's; how far the later edge byte is within the 50 ms it may have over a bare one."""
    median = result["median"]
    names = {"2 Gbit/s": "2_gbit", "4 Gbit/s": "4_gbit", "unshaped": "unshaped", "store": "store"}
    late = max(row["late_s"] for row in median.values() if "late_s" in row)
    ratios = {name: float(median[link]["ratio"]) for link, name in names.items()}
    return ratios | {"50_ms_to_late_byte": 0.05 / max(late, 0.001)}


def pull_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """Throughput to the bare client's; the 100 ms that a cold HEAD may add to the upstream's answer to what it adds."""
    median = result["median"]
    late = max(row["cold_head_s"] - row["upstream_head_s"] for row in median.values())
    names = {"2 Gbit/s": "2_gbit", "unshaped": "unshaped"}
    ratios = {name: float(median[link]["ratio"]) for link, name in names.items()}
    return ratios | {"100_ms_to_cold_head": 0.1 / max(late, 0.001)}


def router_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """Requests and events to the plain proxy's; where peers are installed, what they are to the best of them."""
    median = result["median"]
    ratios = {name: float(median[name]) for name in ("requests_to_plain", "events_to_plain")}
    if "requests_to_best_peer" in median:
        ratios["requests_to_best_peer"] = median["requests_to_best_peer"]
        ratios["best_peer_to_event"] = 1 / median["event_cpu_to_best_peer"]
    if "p99_to_best_peer" in median:
        ratios["best_peer_to_p99"] = 1 / median["p99_to_best_peer"]
    return ratios


def router_memory_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """Memory after the first tenth of the requests to that after all of them; of a stream, 64 kB to what it takes."""
    row = result["router"]
    first, last = row["requests"][0][1], row["requests"][-1][1]
    return {"flat": first / last, "64_kb_to_stream": 64e3 / max(row["stream"], 1.0)}


def metadata_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """The allowed 0.4 ms to open(), 100 ms to the first tensor and 250 MB to what it was; plain find to the mount's."""
    return {
        "400_us_to_open": 0.0004 / result["open_mount_p50_s"],
        "find": result["find_plain_s"] / result["find_s"],
        "100_ms_to_ref": 0.1 / result["median"]["ref_s"],
        "100_ms_to_volume": 0.1 / result["median"]["volume_s"],
        "memory": 250e6 / result["memory_bytes"],
    }


def small_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """The allowed 50 ms to the worst file's p99; 250 MB and the pool to the memory."""
    allowed = 250e6 + result["pool"]["limit"]
    return {"50_ms_to_p99": 0.05 / result["worst_p99_s"], "memory": allowed / result["memory_bytes"]}


def first_tensor_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """The allowed time to the time until the first tensor, for each tier and way of publishing."""
    allowed, median = {"l1": 0.1, "l2": 0.5}, result["median"]
    return {
        f"{limit * 1000:.0f}_ms_to_{way}_{tier}": limit / median[tier][way]
        for tier, limit in allowed.items()
        for way in ("ref", "volume")
    }


def cold_start_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """The allowed 500 ms of a cold start to Helios' own, and the allowed 5 ms of a warm first token."""
    median = result["median"]
    return {
        "500_ms_to_own_share": 0.5 / median["own_s"],
        "5_ms_to_warm_token": 0.005 / max(median["warm_added_s"], 0.0005),  # it may be below what can be told apart
    }


def push_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """Whole files to missing chunks: seconds over either link, and bytes."""
    near, far = result["median"]["loopback"], result["median"]["1000 Mbit/s"]
    return {"bytes": near["bytes"], "tuned": far["tuned"], "new": far["new"], "tuned_near": near["tuned"]}


def kv_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """The allowed 0.1 ms to the p99 of a score; the naive index's memory and time for a block to ours."""
    ours, naive = result["rows"]["ours"], result["rows"]["naive"]
    return {
        "100_us_to_p99": 1e-4 / ours["p99_s"],
        "memory": naive["bytes_per_block"] / ours["bytes_per_block"],
        "blocks": ours["blocks_per_s"] / naive["blocks_per_s"],
    }


def autoscaling_ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """What the forecast spares of the requests hit by cold starts, to the 80% it should; the 15% more hours that it may
    take, to those that it takes; the autoscaler's hours and the moving average's hit requests to its own."""
    rows, ratios = result["rows"]["diurnal"], result["ratios"]["diurnal"]
    ours = rows["Helios, forecast"]
    return {
        "80_percent_to_spared": ratios["spared"] / 0.8,
        "15_percent_to_hours": 1.15 / ratios["hours"],
        "hpa_hours": rows["HPA"]["replica_hours"] / ours["replica_hours"],
        "kubeai_hit": rows["KubeAI"]["hit"] / max(1.0, ours["hit"]),
    }


BENCHMARKS = {
    "ingest": Benchmark(("--gb", "10"), ("--gb", "1", "--rounds", "1"), median_of("ratio"), {"ratio": 0.8}),
    "whole_path": Benchmark(
        ("--gb", "10"),
        ("--gb", "0.5", "--rounds", "1"),
        median_of("publish_ratio", "first_read_ratio"),
        {"publish_ratio": 0.5, "first_read_ratio": 0.3},
    ),
    "fill": Benchmark(("--gb", "1"), ("--gb", "0.25", "--rounds", "1"), median_of("ratio"), {"ratio": 0.8}),
    "first_byte": Benchmark(
        ("--gb", "2"),
        ("--gb", "0.3", "--rounds", "1"),
        lambda result: {"second_to_worst_byte": 1.0 / result["worst_s"]},
        {"second_to_worst_byte": 1.0},
    ),
    "warm_read": Benchmark(
        ("--gb", "2"),
        ("--gb", "0.3", "--rounds", "1"),
        median_of(*WARM, "partial"),
        dict.fromkeys(WARM, 0.95) | {"partial": 1.5 / 9},
    ),
    "cold_link": Benchmark(
        ("--gb", "1"),
        ("--gb", "0.3", "--rounds", "1"),
        cold_ratios,
        {"2_gbit": 0.9, "4_gbit": 0.9, "unshaped": 0.8, "store": 0.8, "50_ms_to_late_byte": 1.0},
    ),
    "cold_pull": Benchmark(
        ("--gb", "1"),
        ("--gb", "0.3", "--rounds", "1"),
        pull_ratios,
        {"2_gbit": 0.8, "unshaped": 0.8, "100_ms_to_cold_head": 1.0},
    ),
    "compression": Benchmark((), ("--gb", "0.2", "--rounds", "1"), median_of("bf16_saved"), {"bf16_saved": 0.25}),
    "csi_publish": Benchmark(
        (),
        ("--rounds", "20", "--volumes", "20", "--at-once", "10"),
        lambda result: {
            "20_ms_to_publish": 0.020 / result["alone"]["publish"]["p50_s"],
            "20_ms_to_publish_beside_volumes": 0.020 / result["full"]["publish"]["p50_s"],
        },
        {"20_ms_to_publish": 1.0},
    ),
    "scaling_wake": Benchmark(
        (),
        ("--rounds", "10"),
        lambda result: {"50_ms_to_push": 0.05 / result["median"]["push"]["p50_s"]},
        {"50_ms_to_push": 1.0},
    ),
    "metadata_ops": Benchmark(
        (),
        ("--models", "10", "--gb", "0.1", "--rounds", "2"),
        metadata_ratios,
        {"400_us_to_open": 1.0, "find": 0.5, "100_ms_to_ref": 1.0, "100_ms_to_volume": 1.0, "memory": 1.0},
    ),
    "first_tensor": Benchmark(
        (),
        ("--gb", "0.2", "--rounds", "2"),
        first_tensor_ratios,
        {"100_ms_to_ref_l1": 1.0, "100_ms_to_volume_l1": 1.0, "500_ms_to_ref_l2": 1.0, "500_ms_to_volume_l2": 1.0},
    ),
    "safetensors_load": Benchmark(
        ("--gb", "2"),
        ("--gb", "0.3", "--rounds", "1"),
        median_of(*LOADS),
        dict.fromkeys(LOADS, 0.95),
    ),
    "load_formats": Benchmark(
        full=("--gb", "2", "--rounds", "3"),
        quick=("--gb", "0.3", "--rounds", "1"),
        ratios=median_of(*FORMATS),
        targets=dict.fromkeys(FORMATS, 0.95),
    ),
    "vllm_load": Benchmark(
        ("--gb", "3", "--rounds", "2"),
        ("--gb", "0.3", "--rounds", "1"),
        median_of(*VLLM),
        {name: VLLM_TARGETS[name.rpartition("_")[2]] for name in VLLM},
    ),
    "cold_start": Benchmark(
        (),
        ("--rounds", "1", "--warm", "30"),
        cold_start_ratios,
        {"500_ms_to_own_share": 1.0, "5_ms_to_warm_token": 1.0},
    ),
    "shadow": Benchmark(
        (),
        ("--gb", "0.2", "--rounds", "3"),
        lambda result: {way: float(result["median"][f"{way}_1"]) for way in result["gb_s"]},
        {"read": 0.95, "passthrough": 0.95},
    ),
    "small_files": Benchmark(
        (),
        ("--gb", "0.2", "--rounds", "20"),
        small_ratios,
        {"50_ms_to_p99": 1.0, "memory": 1.0},
    ),
    "care": Benchmark(
        ("--gb", "1"),
        ("--gb", "0.3", "--rounds", "1"),
        median_of("verify_ratio", "scrub_saves"),
        {"verify_ratio": 0.8, "scrub_saves": 1.5},
    ),
    "client": Benchmark(
        ("--gb", "0.5"),
        ("--gb", "0.2", "--rounds", "3"),
        median_of("sync_ratio", "trio_ratio"),
        {"sync_ratio": 0.95, "trio_ratio": 0.8},
    ),
    "registry_metadata": Benchmark(
        (),
        ("--seconds", "2", "--rounds", "1"),
        lambda result: dict(result["median"]),
        {f"1_ms_to_{way}_{engine}": 1.0 for way in ("sql", "head") for engine in ("sqlite", "postgres")}
        | {f"head_p99_{engine}": 0.5 for engine in ("sqlite", "postgres")},
    ),
    "registry_memory": Benchmark(
        (),
        ("--requests", "4000"),
        lambda result: {"5_mb_to_growth": 5e6 / max(result["growth"], 1e6)},
        {"5_mb_to_growth": 1.0},
    ),
    "local_bytes": Benchmark(
        ("--gb", "1"),
        ("--gb", "0.3", "--rounds", "1"),
        median_of("1 stream", "16 streams"),
        {"1 stream": 0.8, "16 streams": 0.8},
    ),
    "olah": Benchmark(
        ("--gb", "0.5"),
        ("--gb", "0.1", "--rounds", "1"),
        median_of("cold", "16 cold", "warm", "16 warm", "head", "memory"),
        dict.fromkeys(("cold", "16 cold", "warm", "16 warm", "head", "memory"), 1.0),
    ),
    "push": Benchmark(
        (),
        ("--gb", "0.1", "--rounds", "1"),
        push_ratios,
        {"bytes": 5.0, "tuned": 2.0, "new": 0.75, "tuned_near": 0.5},
    ),
    "xet": Benchmark(
        (),
        ("--gb", "0.3", "--rounds", "1"),
        lambda result: {"client": float(result["median"]["client_ratio"]), "growth": 0.01 / result["median"]["growth"]},
        {"client": 0.8, "growth": 1.0},
    ),
    "router_policies": Benchmark(
        (),
        ("--seconds", "40", "--seeds", "1"),
        lambda result: {where.replace(" ", "_"): ratio for where, ratio in result["ratios"].items()},
        {"shared_10": 2.0, "shared_20": 2.0, "distinct_25": 0.95, "distinct_38": 0.95},
    ),
    "disaggregation": Benchmark(
        (),
        ("--seconds", "24", "--seeds", "1"),
        lambda result: {
            f"{where.partition(' ')[0]}_goodput": row["8+8"]["goodput"] / max(row["16"]["goodput"], 0.001)
            for where, row in result["rows"].items()
        },
        {"long_goodput": 1.0, "chat_goodput": 1.0, "short_goodput": 0.9},
    ),
    "autoscaling": Benchmark(
        (),
        ("--traces", "diurnal", "--seeds", "11"),
        autoscaling_ratios,
        {"80_percent_to_spared": 1.0, "15_percent_to_hours": 1.0, "hpa_hours": 1.0, "kubeai_hit": 1.0},
    ),
    "router_decisions": Benchmark(
        (),
        ("--decisions", "4000"),
        lambda result: {"200_us_to_p99": result["target_s"] / result["policies"][result["default"]]["ours_p99_s"]},
        {"200_us_to_p99": 1.0},
    ),
    "router": Benchmark(
        ("--seconds", "5", "--rounds", "3", "--workers", "4"),
        ("--seconds", "1", "--rounds", "1", "--workers", "4"),
        router_ratios,
        {
            "requests_to_plain": 0.7,
            "events_to_plain": 0.8,
            "requests_to_best_peer": 2.0,
            "best_peer_to_event": 1.25,
            "best_peer_to_p99": 1.0,
        },
    ),
    "router_memory": Benchmark(
        (),
        ("--streams", "200", "--requests", "20000"),
        router_memory_ratios,
        {"flat": 0.95, "64_kb_to_stream": 1.0},
    ),
    "router_request": Benchmark(
        ("--workers", "4"),
        ("--workers", "4", "--requests", "500", "--runs", "5"),
        lambda result: {"40_us_to_request": 40.0 / result["median"]["prefix-cache, keys and limits"]["request_us"]},
        {"40_us_to_request": 1.0},
    ),
    "kv_index": Benchmark(
        (),
        ("--blocks", "2000", "--scores", "1000"),
        kv_ratios,
        {"100_us_to_p99": 1.0, "memory": 1.5, "blocks": 0.8},
    ),
}


def run(name: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Run one benchmark and return what it wrote."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        print(f"\n== {name} {' '.join(arguments)}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json", str(out)], check=True)
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def earlier(name: str, arguments: tuple[str, ...], ratio: str) -> list[float]:
    """The ratio in the last runs of this benchmark with these arguments on as many cores."""
    if not HISTORY.exists():
        return []
    rows = [json.loads(line) for line in HISTORY.read_text().splitlines()]
    same = [
        row
        for row in rows
        if (row["benchmark"], row["arguments"], row["cores"]) == (name, list(arguments), os.cpu_count())
    ]
    return [row["ratios"][ratio] for row in same if ratio in row["ratios"]][-REMEMBERED:]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks and keep their ratios.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)} (all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    lines, dropped = [], False
    for name in args.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        arguments = benchmark.quick if args.quick else benchmark.full
        ratios = benchmark.ratios(run(name, arguments))
        for ratio, value in ratios.items():
            before = earlier(name, arguments, ratio)
            usual = statistics.median(before) if before else None
            target = benchmark.targets[ratio]
            verdict = "" if value >= target else "below its target"
            if usual is not None and value < DROP * usual:
                verdict, dropped = "DROPPED", True
            shown = "-" if usual is None else f"{usual:.2f}"
            lines.append(f"{name:18}{ratio:22}{value:8.2f}{target:9.2f}{shown:>9}  {verdict}".rstrip())
        row = {
            "benchmark": name,
            "arguments": arguments,
            "cores": os.cpu_count(),
            "time": int(time.time()),
            "ratios": ratios,
        }
        with HISTORY.open("a") as history:
            history.write(json.dumps(row) + "\n")
    print(f"\n{'benchmark':18}{'ratio':22}{'now':>8}{'target':>9}{'usual':>9}")
    print("\n".join(lines))
    return 1 if dropped else 0


if __name__ == "__main__":
    sys.exit(main())
