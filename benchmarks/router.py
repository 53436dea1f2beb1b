"""The router beside a direct run against the same backend, a plain Starlette + aiohttp proxy, and other routers.

The proxy under test has a core of its own; workers, load and the collector of spans share another (where there are
two). Behind each are ``--workers`` workers, and prompts differ (benchmarks/router_prompts.py), so that a policy has
something to decide. Ours runs with its default policy, keys, limits, metrics and traces (benchmarks/router_peers.py,
which also says how to install the peers): spans of a share ``--trace-ratio`` of the requests go to a collector on
loopback; the share of these that it got is shown, since the router drops what it can't send in time. Measured:

- whole answers from nginx, asked for by wrk at 1 and at 32 connections: requests a second, p50 and p99, CPU of the
  proxy for each request;
- streams from a protocol on uvloop: 64 at once, 100 events each, one every 10 ms: CPU of the proxy for each event;
- open loop, at a quarter, half and three quarters of what the best peer can take: p50, p99 and p99.9 of the time from
  when a request was due, for those that can take that rate, and without a proxy.

Where the compiled modules are (scripts/compiled.py), a router with them is measured beside the interpreted one, and
what is said of peers is said of that. What is added to the time of one request is the difference of the p50s at one
connection. Absolute figures do not travel between machines; ratios of one run do. With ``--processes N`` a router of N
processes stands beside one of one, both on all cores: CPU of all its processes for each request.

    python -m benchmarks.router [--seconds 5] [--rounds 3] [--workers 4] [--trace-ratio 1] [--processes 2]
                                [--only PROXY]... [--json FILE]

Needs nginx and wrk (Debian: nginx-light, wrk).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.common import memory_of, save
from benchmarks.nginx import free_ports
from benchmarks.plots import draw
from benchmarks.router_backend import EVENTS, answers, backends, whole_answers
from benchmarks.router_collector import metrics_of, sent_of, sink
from benchmarks.router_load import TooMany, at_rate, closed, wrk
from benchmarks.router_peers import COMPILED, PEERS, RATIO, Proxy, compiled, installed, ours, plain, version
from benchmarks.router_prompts import bodies

Figures = dict[str, float]
STREAMS = 64
SHARES = (0.25, 0.5, 0.75)
"""Of what the best peer can take: the rates of the open loop."""
CORES = os.sched_getaffinity(0)


@dataclass(frozen=True)
class Scene:
    """What is measured: seconds of each phase, workers behind each proxy, the share of the requests whose spans our
    router sends, and how many processes a second router of ours has (1: there is none)."""

    seconds: float = 5
    workers: int = 4
    trace_ratio: float = RATIO
    processes: int = 1
    only: tuple[str, ...] = ()
    """The proxies; none named: all there are."""

    def __str__(self) -> str:
        few = "one worker" if self.workers == 1 else f"{self.workers} workers"
        share = f"spans of {self.trace_ratio:.4g} of the requests go to a collector on loopback"
        return f"{few} behind each; router: {share if self.trace_ratio else 'no spans are recorded'}"


def core(number: int) -> None:
    """Pin this process to a core, where there is one of that number."""
    cores = sorted(CORES)
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def family(pid: int) -> list[int]:
    """A process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def cpu_s(pid: int) -> float:
    """Processor time of a process, its threads and its children, in seconds, to the nanosecond (schedstats)."""
    total = 0
    for one in family(pid):
        for task in Path(f"/proc/{one}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that has ended
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def spawned(command: list[str], number: int, talks: bool, pinned: bool = True) -> subprocess.Popen[str]:
    """A process on a core of its own, or, not ``pinned``, on all there are; ``talks``: its output is a pipe."""
    where = (lambda: core(number)) if pinned else (lambda: os.sched_setaffinity(0, CORES))
    out = subprocess.PIPE if talks else subprocess.DEVNULL
    errors = None if talks else subprocess.DEVNULL  # some peers log each request
    return subprocess.Popen(command, stdout=out, stderr=errors, text=True, preexec_fn=where)


@contextlib.contextmanager
def started(
    command: list[str], number: int, url: str = "", key: str = "key", pinned: bool = True
) -> Iterator[tuple[str, int]]:
    """A process as ``spawned`` makes it; its URL (its first line, if it is not given) and pid."""
    with spawned(command, number, not url, pinned) as process:
        try:
            where = url or (process.stdout.readline().strip() if process.stdout else "")
            if url:
                uvloop.run(answers(url, key))
            if not where:
                raise SystemExit(f"it ended with {process.wait(20)}: {' '.join(command)}")
            yield where, process.pid
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


class Round:
    """All of them one after the other, then those that can take it at given rates."""

    def __init__(self, work: Path, scene: Scene) -> None:
        self.work, self.scene = work, scene
        (self.collector,) = free_ports(1)
        spans_to = f"http://127.0.0.1:{self.collector}" if scene.trace_ratio else ""
        router, self.key = ours(work, spans_to, scene.trace_ratio)
        self.proxies: dict[str, Proxy] = {"router": router, "plain proxy": plain}
        if COMPILED.is_dir():
            self.proxies["router, compiled"] = compiled(router)
        self.proxies |= {name: PEERS[name](work) for name in installed()}
        if scene.only:
            self.proxies = {name: proxy for name, proxy in self.proxies.items() if name in scene.only}
        self.rows: dict[str, Figures] = {}

    def run(self) -> dict[str, Figures]:
        here = [sys.executable, "-m"]
        streams_of = [*here, "benchmarks.router_backend", "--workers", str(self.scene.workers)]
        collector = [*here, "benchmarks.router_collector", str(self.collector)]
        with (
            whole_answers(self.work, self.scene.workers) as whole,
            started(streams_of, 1) as (streaming, _),
            started(collector, 1),
        ):
            self.rows["direct"] = self.whole("direct", whole[0], None)
            for name, proxy in self.proxies.items():
                command, url = proxy(whole)
                with started(command, 0, url, self.key) as (where, pid):
                    row = self.whole(name, where, pid)
                command, url = proxy(streaming.split())
                with started(command, 0, url, self.key) as (where, pid):
                    row |= self.streams(where, pid)
                self.rows[name] = row
            for count in (1, self.scene.processes) if self.scene.processes > 1 else ():  # both on all cores
                name = f"router, {count} pr."
                command = [*self.proxies["router"](whole)[0], "--processes", str(count)]
                with started(command, 0, pinned=False) as (where, pid):
                    self.rows[name] = self.whole(name, where, pid)
        best = max((self.rows[name]["rps_32"] for name in installed() if name in self.rows), default=0.0)
        for share in SHARES if best else ():
            rate = share * best
            for name in self.rows.keys() & {"direct", *self.proxies}:
                if self.rows[name]["rps_32"] > 1.1 * rate:  # else it is too much for it
                    try:
                        waited = uvloop.run(self.waits(self.proxies.get(name), rate))
                    except TooMany as error:  # a busy machine: the figures of all others are worth keeping
                        print(f"  {name}: {error}", file=sys.stderr, flush=True)
                        continue
                    self.rows[name] |= {f"{key}_at_{share:g}": ms for key, ms in waited.items()}
        return self.rows

    def whole(self, name: str, url: str, pid: int | None) -> Figures:
        out: Figures = {}
        wrk(url, bodies(), self.key, 8, 1, self.work)  # warm up
        for connections in (1, 32):
            before = cpu_s(pid) if pid else 0.0
            seen = wrk(url, bodies(), self.key, connections, self.scene.seconds, self.work)
            out[f"rps_{connections}"] = seen.rate
            out[f"p50_ms_{connections}"] = seen.p50_s * 1e3
            out[f"p99_ms_{connections}"] = seen.p99_s * 1e3
            if pid:
                out[f"cpu_us_{connections}"] = (cpu_s(pid) - before) / seen.requests * 1e6
        if name.startswith("router") and (sent := sent_of(metrics_of(url))) is not None:
            out["spans_sent"] = sent
        print(f"  {name}: {out['rps_32']:.0f} requests/s", file=sys.stderr, flush=True)
        return out

    def streams(self, url: str, pid: int) -> Figures:
        asked = bodies(stream=True)
        uvloop.run(closed(url, asked, 8, 0.5, self.key))
        before = cpu_s(pid)
        count = len(uvloop.run(closed(url, asked, STREAMS, self.scene.seconds, self.key)))
        memory = sum(map(memory_of, family(pid))) / 1e6
        return {"cpu_us_event": (cpu_s(pid) - before) / (count * EVENTS) * 1e6, "memory_mb": memory}

    async def waits(self, proxy: Proxy | None, rate: float) -> Figures:
        """What a request waits at a rate, in milliseconds; without a proxy where there is none.

        Workers and collector are in this process: processes that share a core would wait for each other's turns.
        """
        async with backends(self.scene.workers) as workers:
            collector = await sink(self.collector)
            process, url = None, workers[0]
            try:
                if proxy is not None:
                    command, where = proxy(workers)
                    process = await asyncio.to_thread(spawned, command, 0, not where)
                    out = process.stdout
                    url = where or (await asyncio.to_thread(out.readline)).strip() if out else where
                await answers(url, self.key)
                await closed(url, bodies(), 8, 0.5, self.key)
                times = sorted(await at_rate(url, bodies(), rate, self.scene.seconds, self.key))
            finally:
                if process is not None:
                    process.terminate()
                    await asyncio.to_thread(process.wait)
                collector.close()
        return {name: times[int(len(times) * q)] * 1e3 for name, q in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=Scene.seconds)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=Scene.workers, help="behind each proxy")
    share = "share of the requests whose spans our router sends to a collector; 0: none"
    parser.add_argument("--trace-ratio", type=float, default=RATIO, help=share)
    parser.add_argument("--processes", type=int, default=Scene.processes)
    parser.add_argument("--only", action="append", default=[], metavar="PROXY", help="measure these alone")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    core(1)
    scene = Scene(args.seconds, args.workers, args.trace_ratio, args.processes, tuple(args.only))
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="helios-bench-") as work:
            rounds.append(Round(Path(work), scene).run())
    report(rounds, scene, args.json)


COLUMNS = (
    "rps_1", "p50_ms_1", "p99_ms_1", "rps_32", "p50_ms_32", "p99_ms_32", "cpu_us_32", "cpu_us_event", "memory_mb",
    "spans_sent",
)  # fmt: skip


def table(rows: dict[str, Figures], columns: tuple[str, ...]) -> None:
    print(f"{'':16}" + "".join(f"{column:>14}" for column in columns))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{row[c]:14.2f}" if c in row else f"{'-':>14}" for c in columns))


def report(rounds: list[dict[str, Figures]], scene: Scene, out: Path | None) -> None:
    median = {
        name: {k: statistics.median(r[name][k] for r in rounds if k in r[name]) for k in rounds[0][name]}
        for name in rounds[0]
    }
    print(scene)
    table(median, COLUMNS)
    for share in SHARES:
        if f"p50_at_{share:g}" in median["direct"]:
            table(median, tuple(f"{q}_at_{share:g}" for q in ("p50", "p99", "p999")))
    ratios = ratios_of(median)
    ours_and_plain = [name for name in ("router", "router, compiled", "plain proxy") if name in median]
    added = {name: median[name]["p50_ms_1"] - median["direct"]["p50_ms_1"] for name in ours_and_plain}
    print("added to one request (p50): " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in added.items()))
    targets = {
        "requests_to_best_peer": 2, "event_cpu_to_best_peer": 0.8, "p99_to_best_peer": 1,
        "cpu_of_several_processes": 1.1,
    }  # fmt: skip
    if scene.processes > 1:
        both = [(r[f"router, {scene.processes} pr."], r["router, 1 pr."]) for r in rounds]  # one after the other
        ratios["cpu_of_several_processes"] = statistics.median(n["cpu_us_32"] / one["cpu_us_32"] for n, one in both)
    for name, ratio in ratios.items():
        target = f" (target {targets[name]:g})" if name in targets else ""
        print(f"{name.replace('_', ' ')}: {ratio:.2f}{target}")
    document: dict[str, Any] = {
        "benchmark": "router",
        "time": int(time.time()),
        "cores": len(CORES),
        "scene": asdict(scene),
        "versions": {name: version(name) for name in installed()},
        "rounds": rounds,
        "median": {**ratios, "added_ms": added, "table": median},
    }
    where = save(document, out)
    drawn = [draw(where, *plot, part) for part, plot in plots_of(median).items()]
    print(f"written to {where} and {', '.join(map(str, drawn))}", file=sys.stderr)


Groups = dict[str, Figures]


def plots_of(median: dict[str, Figures]) -> dict[str, tuple[str, str, Groups]]:
    """What is drawn, by its part of the file's name: title, unit, and figures of each proxy that has them."""

    def of(**columns: str) -> Groups:
        """Figures of the columns, under the names of the parameters, in which a space is an underscore."""
        shown = {name.replace("_", " ").strip(): column for name, column in columns.items()}
        found = {proxy: {n: row[c] for n, c in shown.items() if c in row} for proxy, row in median.items()}
        return {proxy: figures for proxy, figures in found.items() if figures}

    plots = {
        "": ("Whole answers", "requests/s", of(_32_connections="rps_32", _1_connection="rps_1")),
        "cpu": ("CPU of the proxy", "us", of(a_request="cpu_us_32", an_event_of_a_stream="cpu_us_event")),
        "memory": ("Memory with 64 streams", "MB", of(memory="memory_mb")),
    }
    for share in SHARES:
        title = f"From when a request was due, at {share:g} of what the best peer can take"
        waits = of(p50=f"p50_at_{share:g}", p99=f"p99_at_{share:g}", p999=f"p999_at_{share:g}")
        if waits:
            plots[f"at-{share:g}"] = title, "ms", waits
    return plots


def ratios_of(median: dict[str, Figures]) -> dict[str, float]:
    """What the targets are about."""
    router, other = median.get("router, compiled", median.get("router")), median.get("plain proxy")
    ratios = {}
    if router and other:
        ratios["requests_to_plain"] = other["cpu_us_32"] / router["cpu_us_32"]
        ratios["events_to_plain"] = other["cpu_us_event"] / router["cpu_us_event"]
    peers = [median[name] for name in installed() if name in median]
    if router and peers:
        ratios["requests_to_best_peer"] = router["rps_32"] / max(row["rps_32"] for row in peers)
        ratios["event_cpu_to_best_peer"] = router["cpu_us_event"] / min(row["cpu_us_event"] for row in peers)
        half = [row["p99_at_0.5"] for row in peers if "p99_at_0.5" in row]
        if half and "p99_at_0.5" in router:
            ratios["p99_to_best_peer"] = router["p99_at_0.5"] / min(half)
    return ratios


if __name__ == "__main__":
    main()
