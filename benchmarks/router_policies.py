"""Scheduling policies beside each other, on simulated vLLM workers (benchmarks/simulator), in virtual time.

The policies are the router's own, on its own set of workers, and see what they see at work: their counts of requests
and tokens in flight, first-byte times, and readings of the workers' metrics two seconds old. Only ``prefix-index`` is
told what the engines' caches hold without delay, which is what KV events say but for the time they take.

Traffic: ``shared`` (150 tenants with 6,000-token prompts of their own), ``chat`` (conversations), ``distinct`` (nothing
in common). Each at two rates, by what eight workers can take under round robin: below it and beyond. The first quarter
of the time warms caches and is not counted. Reported for each, as the median over seeds: time to the first token (p50,
p90, p99), p99 of the mean time between tokens, part of the prompts' tokens that were in a cache, goodput (requests a
second that had their first token within 2 s and a token each 100 ms).

With ``--processes N`` the requests come to N processes in turn, which share what the router's share: loads, and for
``prefix-cache`` the memory of who got which prompt.

    python -m benchmarks.router_policies [--seconds 120] [--seeds 3] [--processes 1] [--json FILE]

Targets: ``prefix-cache``, the default, has at most half of round robin's p90 on ``shared``, and is at most 5% behind it
on ``distinct``.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import plots
from benchmarks.common import save
from benchmarks.simulator.engine import Engine, Profile, Sequence_
from benchmarks.simulator.traffic import Arrival, conversations, distinct, shared
from helios.config import WorkerSettings
from router.relay.fields import read
from router.scheduling.configured import Tools, build
from router.scheduling.homes import Homes, size
from router.scheduling.request import Request
from router.worker import Lease, Worker
from router.worker_metrics import WorkerMetrics
from router.workers import Workers

WORKERS: Final = 8
SCRAPE_S: Final = 2.0
POLICIES: Final = (
    "round-robin", "random", "least-requests", "least-tokens", "power-of-two", "queue-depth", "latency",
    "session-affinity", "prefix-affinity", "prefix-cache", "prefix-index",
)  # fmt: skip
TRAFFIC: Final[Mapping[str, Callable[[float, float, int], Iterable[Arrival]]]] = {
    "shared": shared, "chat": conversations, "distinct": distinct,
}  # fmt: skip
RATES: Final = {"shared": (10.0, 20.0), "chat": (25.0, 40.0), "distinct": (25.0, 38.0)}
"""Requests a second."""
TTFT_S, BETWEEN_S = 2.0, 0.1
YARDSTICK, OURS = "round-robin", "prefix-cache"


@dataclass(slots=True)
class Flight:
    """A request on its way."""

    arrival: Arrival
    sequence: Sequence_
    lease: Lease
    first_at: float = 0.0
    ended_at: float = 0.0


class Site:
    """Eight workers behind one policy, in as many processes as are wanted, and the clock."""

    def __init__(self, policy: str, profile: Profile, seed: int, processes: int) -> None:
        self.now = 0.0
        self.engines = [Engine(profile) for _ in range(WORKERS)]
        urls = [f"http://worker-{number}:8000" for number in range(WORKERS)]
        self.workers = Workers([WorkerSettings(model="m", url=url) for url in urls], lambda: self.now)
        self._engine_of: dict[Worker, int] = {}
        for worker in self.workers.all:
            worker.health.succeeded()
            self._engine_of[worker] = urls.index(worker.url)
        memory = bytearray(size(1 << 17))
        policies = [
            build(
                policy,
                Tools(
                    lambda: self.now, random.Random(seed * processes + process), 3 * SCRAPE_S, self,
                    lambda entries: Homes(memory, entries),
                ),
            ).policy
            for process in range(processes)
        ]  # fmt: skip
        self._policies = itertools.cycle(policies)
        self._asking: Arrival | None = None
        self._flights: dict[Sequence_, Flight] = {}

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[int]:
        """What an index of KV events would say."""
        asking = self._asking
        assert asking is not None
        return [self.engines[self._engine_of[w]].held(asking.segments, asking.prompt) for w in candidates]

    def arrive(self, arrival: Arrival) -> int:
        """Choose a worker, which gets the request; returns its number."""
        self._asking, body = arrival, arrival.body()
        request = Request("m", read(body), path="/v1/chat/completions", body=body)
        worker = next(self._policies).choose(request, self.workers.candidates("m", ()))
        lease = self.workers.lease(worker, request.tokens, None, request.prefill)
        sequence = Sequence_(arrival.segments, arrival.prompt, arrival.output)
        self._flights[sequence] = Flight(arrival, sequence, lease)
        number = self._engine_of[worker]
        self.engines[number].submit(sequence)
        return number

    def scrape(self) -> None:
        for worker, number in self._engine_of.items():
            engine = self.engines[number]
            worker.metrics = WorkerMetrics(
                self.now, worker.load.requests, len(engine.running), len(engine.waiting), engine.usage
            )

    def came(self, number: int, first: Iterable[Sequence_], ended: Iterable[Sequence_]) -> list[Flight]:
        """A step is over; returns the requests that are."""
        for sequence in first:
            flight = self._flights[sequence]
            flight.first_at = self.now
            flight.lease.computed()
            worker = next(w for w, at in self._engine_of.items() if at == number)
            worker.first_byte[1].observe(self.now - flight.arrival.at, self.now)
        over = [self._flights.pop(sequence) for sequence in ended]
        for flight in over:
            flight.ended_at = self.now
            flight.lease.end()
        return over


def simulate(
    policy: str, arrivals: Iterable[Arrival], seconds: float, profile: Profile, seed: int, processes: int = 1
) -> dict[str, float]:
    """One run until all that came within ``seconds`` is answered."""
    site = Site(policy, profile, seed, processes)
    order = itertools.count()
    events: list[tuple[float, int, int, Any]] = []
    coming = iter(arrivals)
    over: list[Flight] = []
    stepping = [False] * WORKERS

    def push(at: float, number: int, what: Any) -> None:
        heapq.heappush(events, (at, next(order), number, what))

    def begin(number: int) -> None:
        took, first, ended = site.engines[number].step()
        stepping[number] = True
        push(site.now + took, number, (first, ended))

    def next_arrival() -> None:
        if (arrival := next(coming, None)) is not None:
            push(arrival.at, -1, arrival)

    next_arrival()
    push(0.0, -2, None)
    while events:
        site.now, _, number, what = heapq.heappop(events)
        if number == -2:
            site.scrape()
            if site.now < seconds:
                push(site.now + SCRAPE_S, -2, None)
        elif number == -1:
            at = site.arrive(what)
            if not stepping[at]:
                begin(at)
            next_arrival()
        else:
            over += site.came(number, *what)
            stepping[number] = False
            if site.engines[number].busy:
                begin(number)
    counted = [flight for flight in over if flight.arrival.at >= seconds / 4]
    return _figures(counted, seconds * 3 / 4)


def _figures(flights: Sequence[Flight], seconds: float) -> dict[str, float]:
    ttft = sorted(f.first_at - f.arrival.at for f in flights)
    between = sorted((f.ended_at - f.first_at) / max(1, f.arrival.output - 1) for f in flights)
    good = sum(
        f.first_at - f.arrival.at <= TTFT_S and (f.ended_at - f.first_at) / max(1, f.arrival.output - 1) <= BETWEEN_S
        for f in flights
    )
    prompts = sum(f.arrival.prompt for f in flights)
    return {
        "ttft_p50_s": _part(ttft, 0.5), "ttft_p90_s": _part(ttft, 0.9), "ttft_p99_s": _part(ttft, 0.99),
        "between_p99_s": _part(between, 0.99), "hits": sum(f.sequence.cached for f in flights) / prompts,
        "goodput": good / seconds, "requests": float(len(flights)),
    }  # fmt: skip


def _part(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Scheduling policies beside each other, on simulated workers.")
    parser.add_argument("--seconds", type=float, default=120, help="of virtual time (120)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, with other arrivals (3)")
    parser.add_argument("--processes", type=int, default=1, help="of the router (1)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES, help="only these")
    parser.add_argument("--json", type=Path, help="where the result goes; default benchmarks/results/")
    args = parser.parse_args()
    profile = Profile()
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for kind, rates in RATES.items():
        for rate in rates:
            print(f"\n{kind}, {rate:g} requests a second, {WORKERS} workers")
            print(f"{'':18}{'TTFT p50':>10}{'p90':>8}{'p99':>8}{'between p99':>13}{'cached':>9}{'goodput':>9}")
            row = rows.setdefault(f"{kind} {rate:g}", {})
            for policy in args.policies:
                runs = [
                    simulate(
                        policy, TRAFFIC[kind](rate, args.seconds, seed), args.seconds, profile, seed, args.processes
                    )
                    for seed in range(args.seeds)
                ]
                found = row[policy] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                print(
                    f"{policy:18}{found['ttft_p50_s']:9.2f}s{found['ttft_p90_s']:7.2f}s{found['ttft_p99_s']:7.2f}s"
                    f"{found['between_p99_s'] * 1000:10.0f} ms{found['hits']:9.0%}{found['goodput']:8.1f}/s",
                    flush=True,
                )
    if not {YARDSTICK, OURS} <= set(args.policies):
        return
    ratios = {where: row[YARDSTICK]["ttft_p90_s"] / max(row[OURS]["ttft_p90_s"], 1e-9) for where, row in rows.items()}
    print(f"\n{OURS} beside {YARDSTICK}, TTFT p90:")
    for where, ratio in ratios.items():
        wanted = 2.0 if where.startswith("shared") else 0.95
        print(f"  {where:16} {ratio:6.2f}x" + ("" if ratio >= wanted else f"   NOT the {wanted:g}x that is wanted"))
    result = {
        "benchmark": "router_policies", "time": int(time.time()), "seconds": args.seconds, "seeds": args.seeds,
        "processes": args.processes,
        "rows": rows, "ratios": ratios,
    }  # fmt: skip
    out = save(result, args.json)
    groups = {where: {name: one["ttft_p90_s"] for name, one in row.items()} for where, row in rows.items()}
    print(f"\n{out}\n{plots.draw(out, 'Time to the first token, p90', 's', groups)}")


if __name__ == "__main__":
    main()
