"""The registry's memory over 100,000 requests of all kinds.

A real registry with some repositories; clients ask it in a random but repeatable order for heads, whole small files,
ranges, listings, information, histories, recipes and placements, and for what is not there. RssAnon + RssShmem is read
after every twentieth of the requests, when none is under way. Caches have bounds and fill in the beginning; from a
fifth of the requests on it should stay where it is.

    python -m benchmarks.registry_memory [--requests 100000] [--connections 8] [--json FILE]

Target: at most 5 MB more at the end than after a fifth.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import memory_of, save, together
from benchmarks.plots import draw
from benchmarks.registry_metadata import FILES, fill
from benchmarks.scene import registry, registry_pid, stoppable
from helios.home import Home
from helios.http.client import HttpClient

STEPS, SETTLED = 20, 4
"""How often memory is read, and after how many of these times the caches are full."""
TARGET = 5e6
"""Bytes that it may have grown from then to the end."""

Ask = tuple[str, str, dict[str, str], int]
"""Method, path, headers, and the status that the answer must have."""


def kinds(repos: list[tuple[str, str]], rng: random.Random) -> dict[str, Callable[[], Ask]]:
    """Ways of asking, each with its own random repository and file."""

    def repo() -> str:
        return rng.choice(repos)[0]

    def file() -> str:
        return f"file{rng.randrange(FILES)}.txt"

    def native(call: str) -> Ask:
        name, commit = rng.choice(repos)
        return "GET", f"/api/v1/{call}?repo=models/{name}&commit={commit}", {}, 200

    span = {"range": "bytes=100-1099"}
    return {
        "head": lambda: ("HEAD", f"/{repo()}/resolve/main/{file()}", {}, 200),
        "file": lambda: ("GET", f"/{repo()}/resolve/main/{file()}", {}, 200),
        "range": lambda: ("GET", f"/{repo()}/resolve/main/{file()}", span, 206),
        "info": lambda: ("GET", f"/api/models/{repo()}", {}, 200),
        "tree": lambda: ("GET", f"/api/models/{repo()}/tree/main", {}, 200),
        "refs": lambda: ("GET", f"/api/models/{repo()}/refs", {}, 200),
        "commits": lambda: ("GET", f"/api/models/{repo()}/commits/main", {}, 200),
        "list": lambda: ("GET", f"/api/models?search=model{rng.randrange(60)}", {}, 200),
        "resolve": lambda: ("GET", f"/api/v1/resolve?repo=models/{repo()}&rev=main", {}, 200),
        "manifest": lambda: native("manifest"),
        "content": lambda: native("content"),
        "no file": lambda: ("HEAD", f"/{repo()}/resolve/main/no-{rng.randrange(10**9)}", {}, 404),
        "no ref": lambda: ("GET", f"/api/v1/resolve?repo=models/{repo()}&rev=no-{rng.randrange(10**9)}", {}, 404),
        "no repo": lambda: ("HEAD", f"/org/no-{rng.randrange(10**9)}/resolve/main/a", {}, 404),
    }


def ask(client: HttpClient, repos: list[tuple[str, str]], count: int, seed: int, seen: Counter[str]) -> None:
    rng = random.Random(seed)
    ways = list(kinds(repos, rng).items())
    for _ in range(count):
        name, make = rng.choice(ways)
        method, path, headers, expected = make()
        with client.request(method, path, headers=headers) as response:
            response.read()
        if response.status != expected:
            raise SystemExit(f"{method} {path}: {response.status}, not {expected}")
        seen[name] += 1


def run(requests: int, connections: int) -> dict[str, Any]:
    each, rows = max(1, requests // STEPS // connections), []
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="helios-bench-") as directory:
        home = Home(Path(directory))
        repos = fill(home.root, None)
        # What is not there is not asked of anybody else.
        with registry(home, environ={"HELIOS_REGISTRY__MIRROR": "off"}) as url:
            pid, began = registry_pid(home), time.perf_counter()
            for step in range(STEPS):
                counts = [Counter[str]() for _ in range(connections)]
                with closing(HttpClient(url)) as client:
                    seeds = range(step * connections, (step + 1) * connections)
                    together([partial(ask, client, repos, each, *of) for of in zip(seeds, counts, strict=True)])
                seen.update(sum(counts, Counter[str]()))
                rows.append({"requests": seen.total(), "bytes": memory_of(pid)})
                print(f"{seen.total():>10}{rows[-1]['bytes'] / 1e6:10.1f} MB", flush=True)
            seconds = time.perf_counter() - began
    return {
        "benchmark": "registry_memory",
        "requests": seen.total(),
        "kinds": dict(seen),
        "rate": seen.total() / seconds,
        "rows": rows,
        "growth": rows[-1]["bytes"] - rows[SETTLED - 1]["bytes"],
        "most": max(row["bytes"] for row in rows),
        "time": int(time.time()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with stoppable():
        result = run(args.requests, args.connections)
    out = save(result, args.json)
    draw(out, "Memory", "MB", {str(row["requests"]): {"registry": row["bytes"] / 1e6} for row in result["rows"]})
    print(
        f"{result['requests']} requests, {result['rate']:.0f}/s: {result['most'] / 1e6:.1f} MB at most, "
        f"{result['growth'] / 1e6:+.1f} MB since the first fifth (target: at most +{TARGET / 1e6:.0f} MB); "
        f"written to {out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
