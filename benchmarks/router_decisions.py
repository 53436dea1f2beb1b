"""One decision of the router at 100 models x 100 workers, while 1% of the workers are replaced each second.

Each model has a shared pool of 100 workers; there are 10,000 of them. For every policy: what ``Exchange`` does between
a body that was read and a connection (the request as scheduling sees it, candidates, choice, lease; an older lease
ends meanwhile, so that about 400 requests are in flight for a model that is asked for), with prompts of about 2,000
characters of which half share their beginning with others. Its yardstick is a bare ``min()`` over the same workers by
their requests, in the same run. Between decisions the set changes as a source would change it, 1% a second in ten
steps, at 2,000 decisions a second; what such a step takes stands in the table, too.

Times are the thread's CPU time, since a machine that does other work at the same time stops the process wherever it
is, and what is stopped finds its caches cold. ``undisturbed`` takes that out: the p99 over the same requests of the
best of eight times that each is decided while the set stands still.

    python -m benchmarks.router_decisions [--decisions 10000] [--json FILE]

Target: p99 of the default policy < 0.2 ms.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import save
from helios.config import WorkerSettings
from router.membership import CONFIGURATION
from router.relay.fields import read
from router.relay.said import Fields
from router.scheduling.configured import POLICIES, Tools, build
from router.scheduling.policy import Policy
from router.scheduling.request import Request
from router.worker import Lease, Worker
from router.worker_metrics import WorkerMetrics
from router.workers import Workers

MODELS = 100
EACH = 100
CHURN = 0.01
"""Part of the workers that is replaced each second."""
STEPS = 10
"""Changes a second in which that happens..."""
RATE = 2000
"""...of so many decisions: by their number, so a slow machine measures the same."""
ACTIVE = 5
"""Models that get the requests: those that are in flight are spread over few, as it is at work."""
IN_FLIGHT = 2000
TIMES = 8
"""How often each request is decided for ``undisturbed``."""
TARGET_S = 0.0002
CHAT = "/v1/chat/completions"
DEFAULT = "prefix-cache"


class Index:
    """Answers as an index of KV events would: some workers have a part of a prompt."""

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[int]:
        key = request.prefix_key(1024) or 0
        return [(worker.seed ^ key) % 512 for worker in candidates]


class Site:
    """The workers, and how they change. Every worker has fresh metrics and is up."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._count = 0
        self._settings = [self._made(model) for model in range(MODELS) for _ in range(EACH)]
        self.workers = Workers((), time.monotonic)
        self.workers.apply(CONFIGURATION, self._settings)
        self.changes: list[float] = []
        for worker in self.workers.all:
            self._starts(worker)

    def _made(self, model: int) -> WorkerSettings:
        self._count += 1
        revision = "new" if self._count % 4 == 0 else "old"
        return WorkerSettings(
            model=f"org/model-{model}", url=f"http://worker-{self._count}.workers:8000", revision=revision,
        )  # fmt: skip

    def _starts(self, worker: Worker) -> None:
        worker.health.succeeded()
        worker.metrics = WorkerMetrics(time.monotonic() + 3600, 0, 4, self._rng.randrange(4), self._rng.random())

    def change(self) -> None:
        """Replace as many workers as are due, and note how long the set took for it, in seconds."""
        places = self._rng.sample(range(len(self._settings)), int(len(self._settings) * CHURN / STEPS))
        for place in places:
            self._settings[place] = self._made(place // EACH)
        began = time.thread_time()
        self.workers.apply(CONFIGURATION, self._settings)
        self.changes.append(time.thread_time() - began)
        for place in places:
            (worker,) = (w for w in self.workers.of(self._settings[place].model) if w.url == self._settings[place].url)
            self._starts(worker)


def bodies(count: int) -> list[bytes]:
    """Chats for the active models; every second one begins like nine others."""
    rng = random.Random(5)
    made = []
    for number in range(count):
        topic = number // 20 if number % 2 else -number - 1
        text = f"tenant {topic}: " + "the quick brown fox " * 100 + f"question {number}"
        fields = {"model": f"org/model-{rng.randrange(ACTIVE)}", "stream": True, "max_tokens": 200, "user": f"u{topic}"}
        made.append(json.dumps({**fields, "messages": [{"role": "user", "content": text}]}).encode())
    return made


def measure(policy: Policy, site: Site, requests: Sequence[bytes], wanted: int) -> dict[str, float]:
    """Seconds per decision: p50, p99 and the worst, and the same of the yardstick, in turn with it."""
    workers = site.workers
    held: deque[Lease] = deque()
    ours, wall, bare = [], [], []
    read_bodies = [(read(body), body) for body in requests]
    clock, watch = time.thread_time, time.perf_counter
    for number in range(wanted):
        if number % (RATE // STEPS) == 0:
            site.change()
        fields, body = read_bodies[number % len(read_bodies)]
        model = fields.model or ""
        seen, began = watch(), clock()
        if len(held) >= IN_FLIGHT:
            held.popleft().end()
        candidates = workers.candidates(model, ())
        request = Request(model, fields, path=CHAT, body=body, adapter=workers.adapter(model))
        worker = policy.choose(request, candidates)
        held.append(workers.lease(worker, request.tokens, request.adapter))
        ours.append(clock() - began)
        wall.append(watch() - seen)
        everyone = workers.of(model)
        began = clock()
        min(everyone, key=_load)
        bare.append(clock() - began)
    for lease in held:
        lease.end()
    row = {f"ours_{part}_s": value for part, value in _parts(ours)}
    row |= {f"bare_{part}_s": value for part, value in _parts(bare)}
    changes = site.changes or [0.0]
    return row | {
        "wall_p99_s": _parts(wall)[1][1],
        "change_p50_s": statistics.median(changes), "change_max_s": max(changes),
    }  # fmt: skip


def undisturbed(policy: Policy, site: Site, requests: Sequence[bytes]) -> float:
    """The p99 over requests of the least seconds that each took, with as many in flight as otherwise."""
    workers, clock = site.workers, time.thread_time
    read_bodies = [(read(body), body) for body in requests]

    def decided(fields: Fields, body: bytes) -> tuple[float, Lease]:
        began = clock()
        model = fields.model or ""
        candidates = workers.candidates(model, ())
        request = Request(model, fields, path=CHAT, body=body, adapter=workers.adapter(model))
        lease = workers.lease(policy.choose(request, candidates), request.tokens, request.adapter)
        return clock() - began, lease

    held = [decided(*read_bodies[number % len(read_bodies)])[1] for number in range(IN_FLIGHT)]
    best = [1.0] * len(read_bodies)
    for _ in range(TIMES):
        for number, one in enumerate(read_bodies):
            took, lease = decided(*one)
            lease.end()
            best[number] = min(best[number], took)
    for lease in held:
        lease.end()
    return _parts(best)[1][1]


def _load(worker: Worker) -> int:
    return worker.load.requests


def _parts(times: list[float]) -> list[tuple[str, float]]:
    times.sort()
    return [("p50", times[len(times) // 2]), ("p99", times[int(len(times) * 0.99)]), ("max", times[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description="What one decision of the router costs, for every policy.")
    parser.add_argument("--decisions", type=int, default=10000, help="for each policy (10000)")
    parser.add_argument("--json", type=Path, help="where the result goes; default benchmarks/results/")
    args = parser.parse_args()
    requests = bodies(400)
    rows: dict[str, dict[str, float]] = {}
    print(
        f"{'us':18}{'p50':>8}{'p99':>8}{'max':>8}{'undisturbed':>13}{'wall p99':>10}"
        f"{'min() p50':>12}{'p99':>8}{'change p50':>13}{'max':>8}"
    )
    for name in POLICIES:
        site = Site(7)
        wanted: Any = {"name": name, "weights": {"old": 9, "new": 1}} if name == "canary" else name
        tools = Tools(time.monotonic, random.Random(1), 1e9, Index())
        gc.collect()
        gc.freeze()  # what a router has had for a while is not looked at in each collection
        policy = build(wanted, tools).policy
        row = rows[name] = measure(policy, site, requests, args.decisions)
        row["undisturbed_p99_s"] = undisturbed(policy, site, requests)
        gc.unfreeze()
        shown = (
            "ours_p50_s", "ours_p99_s", "ours_max_s", "undisturbed_p99_s", "wall_p99_s", "bare_p50_s", "bare_p99_s",
            "change_p50_s", "change_max_s",
        )  # fmt: skip
        widths = (8, 8, 8, 13, 10, 12, 8, 13, 8)
        columns = [f"{row[key] * 1e6:{width}.0f}" for key, width in zip(shown, widths, strict=True)]
        print(f"{name:18}{''.join(columns)}", flush=True)
    result = {
        "benchmark": "router_decisions", "time": int(time.time()), "models": MODELS, "workers_each": EACH,
        "churn_per_s": CHURN, "target_s": TARGET_S, "default": DEFAULT, "policies": rows,
    }  # fmt: skip
    print(f"\nresult: {save(result, args.json)}")


if __name__ == "__main__":
    main()
