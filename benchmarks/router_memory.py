"""Memory of the router: with 2,000 streams open, and over 1,000,000 requests.

Streams bring an event a second each. What a stream takes is the growth of all the router's processes, divided; what is
left when all clients have gone, all at once, is shown beside it. Then wrk asks for whole answers, as fast as they come;
memory is looked at after each tenth. Ours runs as in benchmarks/router.py, but that it has one worker and no collector
of its spans; peers stand beside it where they are installed.

    python -m benchmarks.router_memory [--streams 2000] [--requests 1000000] [--json FILE]

Needs nginx and wrk (Debian: nginx-light, wrk).
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.common import memory_of, save
from benchmarks.plots import draw
from benchmarks.router import family, started
from benchmarks.router_backend import BODY, STREAMED, whole_answers
from benchmarks.router_load import request_of, wrk
from benchmarks.router_peers import PEERS, installed, ours, version

SLICES = 10
SETTLE_S = 3.0


def memory(pid: int) -> int:
    """Own memory of a process and its children, in bytes."""
    return sum(map(memory_of, family(pid)))


class Listener(asyncio.Protocol):
    """A client of one stream."""

    def __init__(self) -> None:
        self.came = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.came += len(data)


async def streams(url: str, key: str, count: int, pid: int) -> dict[str, float]:
    """Memory before, with all of them open, and after they left, in bytes."""
    host, port = url.removeprefix("http://").split(":")
    before, clients = memory(pid), list[Listener]()
    loop = asyncio.get_running_loop()
    for _ in range(count):
        _, client = await loop.create_connection(Listener, host, int(port))
        client.transport.write(request_of(STREAMED, key))
        clients.append(client)
        if len(clients) % 50 == 0:
            await asyncio.sleep(0.02)
    until = time.monotonic() + 60
    while not all(client.came > 500 for client in clients):
        if time.monotonic() > until:
            raise SystemExit(f"only {sum(client.came > 500 for client in clients)} of {count} streams bring events")
        await asyncio.sleep(0.5)
    during = memory(pid)
    for client in clients:
        client.transport.abort()
    await asyncio.sleep(SETTLE_S)
    return {"before": before, "during": during, "after": memory(pid), "stream": (during - before) / count}


def requests(url: str, key: str, count: int, pid: int, work: Path) -> list[tuple[int, int]]:
    """Requests so far and memory in bytes, after each tenth of them."""
    wrk(url, (BODY,), key, 32, 2, work)
    rate = wrk(url, (BODY,), key, 32, 2, work).rate
    done, rows = 0, list[tuple[int, int]]()
    while done < count:
        done += wrk(url, (BODY,), key, 32, max(1.0, count / SLICES / rate), work).requests
        rows.append((done, memory(pid)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    backend = [sys.executable, "-m", "benchmarks.router_backend", "--events", "600", "--pace", "1"]
    result: dict[str, Any] = {"benchmark": "router_memory", "time": int(time.time())}
    with tempfile.TemporaryDirectory(prefix="helios-bench-") as directory:
        work = Path(directory)
        router, key = ours(work)
        proxies = {"router": router} | {name: PEERS[name](work) for name in installed() if name != "litellm"}
        result["versions"] = {name: version(name) for name in proxies if name != "router"}
        with started(backend, 1) as (streaming, _), whole_answers(work) as (whole,):
            for name, proxy in proxies.items():
                command, url = proxy([streaming])
                with started(command, 0, url, key) as (where, pid):
                    row: dict[str, Any] = uvloop.run(streams(where, key, args.streams, pid))
                command, url = proxy([whole])
                with started(command, 0, url, key) as (where, pid):
                    row["requests"] = requests(where, key, args.requests, pid, work)
                result[name] = row
                report(name, row, args.streams)
    out = save(result, args.json)
    groups = {
        name: {
            "idle": result[name]["before"] / 1e6,
            f"{args.streams} streams": result[name]["during"] / 1e6,
            **{f"{count:,} requests": held / 1e6 for count, held in (result[name]["requests"][n] for n in (0, -1))},
        }
        for name in proxies
    }
    print(f"written to {out} and {draw(out, 'Memory', 'MB', groups)}", file=sys.stderr)


def report(name: str, row: dict[str, Any], count: int) -> None:
    first, last = row["requests"][0], row["requests"][-1]
    print(
        f"{name:14} {row['before'] / 1e6:6.1f} MB idle, {row['during'] / 1e6:6.1f} with {count} streams "
        f"({row['stream'] / 1e3:.1f} kB each), {row['after'] / 1e6:6.1f} after; "
        f"{first[1] / 1e6:.1f} MB after {first[0]:,} requests, {last[1] / 1e6:.1f} after {last[0]:,}",
        flush=True,
    )


if __name__ == "__main__":
    main()
