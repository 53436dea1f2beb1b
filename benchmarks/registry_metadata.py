"""Looking things up in the registry: from SQL, from memory and over HTTP, on SQLite and on PostgreSQL.

- ``sql``: a revision resolved by the catalog with nothing in memory, in this process: p50 and p99.
- ``memory``: the same once it is hot. On PostgreSQL the database is still asked whether anything has changed.
- ``head``: HEAD of a file through HTTP, an open loop of 1,000 requests a second over 32 connections. A request's time
  counts from when it was due, whether or not a connection was free for it then.
- The yardstick is a Starlette route on the same server class that answers with constants, under the same load.

The server has a core of its own, load and PostgreSQL the other (where there are two). PostgreSQL is Debian's, on a unix
socket.

    python -m benchmarks.registry_metadata [--seconds 10] [--rounds 3] [--rate 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.router import core, cpu_s

ENGINES = ("sqlite", "postgres")
CONNECTIONS = 32
REPOS, FILES = 50, 20


# --- the yardstick ---------------------------------------------------------------------------------------------------


def serve_constant() -> None:
    """A route that does nothing, with as many headers as an answer of ours has."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from helios.http.server import listen_tcp, make_server, url_of

    headers = {
        "content-length": "20000",
        "content-type": "application/json",
        "etag": '"' + "0" * 40 + '"',
        "x-repo-commit": "1" * 40,
        "accept-ranges": "bytes",
        "content-disposition": 'inline; filename="config.json"',
        "access-control-expose-headers": "X-Repo-Commit,ETag,X-Linked-Size",
    }

    async def head(_request: Request) -> Response:
        return Response(headers=headers)

    app = Starlette(routes=[Route("/{path:path}", head, methods=["GET", "HEAD"])])
    sock = listen_tcp("127.0.0.1", 0)
    print(url_of(sock, "127.0.0.1"), flush=True)
    asyncio.run(make_server(app).serve(sockets=[sock]))


# --- the load --------------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection; ``free`` is called with it and the time of each answer."""

    def __init__(self, free: Callable[[Client], None]) -> None:
        self.free = free
        self.due = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.free(self)

    def ask(self, request: bytes, due: float) -> None:
        self.due, self.data = due, b""
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.data.endswith(b"\r\n\r\n"):  # a HEAD's answer ends with its head
            if not self.data.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"answered: {self.data[:200]!r}")
            self.free(self)


async def open_loop(url: str, paths: list[str], rate: float, seconds: float) -> list[float]:
    """Seconds from when each request was due to its answer."""
    host, port = url.removeprefix("http://").split(":")
    requests = [f"HEAD {path} HTTP/1.1\r\nHost: h\r\nAccept-Encoding: identity\r\n\r\n".encode() for path in paths]
    idle: list[Client] = []
    waiting: deque[tuple[bytes, float]] = deque()
    times: list[float] = []
    total, answered = int(rate * seconds), asyncio.Event()
    loop = asyncio.get_running_loop()

    def free(client: Client) -> None:
        if client.due:
            times.append(time.perf_counter() - client.due)
            if len(times) == total:
                answered.set()
        if waiting:
            client.ask(*waiting.popleft())
        else:
            client.due = 0.0
            idle.append(client)

    for _ in range(CONNECTIONS):
        await loop.create_connection(lambda: Client(free), host, int(port))
    begin, sent = time.perf_counter(), 0
    while sent < total:
        now = time.perf_counter()
        while sent < total and begin + sent / rate <= now:
            request, due = requests[sent % len(requests)], begin + sent / rate
            sent += 1
            if idle:
                idle.pop().ask(request, due)
            else:
                waiting.append((request, due))
        await asyncio.sleep(0.0002)
    async with asyncio.timeout(30):
        await answered.wait()
    for client in idle:
        client.transport.close()
    return times


# --- one run ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(command: list[str], **env: str) -> Iterator[tuple[str, int]]:
    """A server on core 0; its URL (its first line) and pid."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **env},
        preexec_fn=lambda: core(0),
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.terminate()
            process.wait(30)


def quantiles(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    return {"p50_ms": statistics.median(times) * 1e3, "p99_ms": times[int(len(times) * 0.99)] * 1e3}


def fill(root: Path, url: str | None) -> list[tuple[str, str]]:
    """Publish some repositories; returns (repository, commit)."""
    import io

    with opened(root, url) as catalog:
        from helios.names import RepoId
        from registry.ingest.ingest import Ingest
        from registry.sessions import Sessions

        sessions, out = Sessions(catalog, catalog.store, Ingest(catalog.store, catalog.index)), []
        rng = random.Random(1)
        for number in range(REPOS):
            repo = RepoId.parse(f"org/model{number}")
            with sessions.open(repo) as session:
                files = {
                    f"file{n}.txt": session.ingest(f"file{n}.txt", 2000, io.BytesIO(rng.randbytes(2000))).entry
                    for n in range(FILES)
                }
                out.append(
                    (repo.id, catalog.publisher.publish(repo, "main", files, author="", message="").record.commit)
                )
        return out


@contextlib.contextmanager
def opened(root: Path, url: str | None) -> Iterator[Any]:
    from heliosfs.store.directory import DirectoryStore
    from registry.catalog import Catalog
    from registry.metadata.database import Database

    database = Database.sqlite(root / "registry" / "metadata.db") if url is None else Database.postgres(url)
    with contextlib.closing(database), DirectoryStore(root / "store") as store:
        yield Catalog(database, store)


def in_process(root: Path, url: str | None, repos: list[tuple[str, str]], count: int = 2000) -> dict[str, Any]:
    """Look-ups by the catalog itself."""
    from helios.names import RepoId

    names = [RepoId.parse(name) for name, _ in repos]
    times: dict[str, list[float]] = {"sql": [], "memory": []}
    with opened(root, url) as catalog:
        for number in range(count):
            repo = names[number % len(names)]
            catalog.forget()
            for way in ("sql", "memory"):
                began = time.perf_counter()
                catalog.confirm()
                catalog.resolve(repo, "main")
                times[way].append(time.perf_counter() - began)
    return {way: quantiles(found) for way, found in times.items()}


def heads(url: str, pid: int, paths: list[str], rate: float, seconds: float) -> dict[str, float]:
    import uvloop

    uvloop.run(open_loop(url, paths, rate, 1.0))  # warm up
    before = cpu_s(pid)
    times = uvloop.run(open_loop(url, paths, rate, seconds))
    return quantiles(times) | {"cpu_us": (cpu_s(pid) - before) / len(times) * 1e6}


def one_round(rate: float, seconds: float) -> dict[str, Any]:
    from tests.support.postgres import running

    helios = str(Path(sys.executable).parent / "helios")
    out: dict[str, Any] = {}
    with started([sys.executable, "-m", "benchmarks.registry_metadata", "--role", "constant"]) as (url, pid):
        out["constant"] = {"head": heads(url, pid, ["/org/model/resolve/main/config.json"], rate, seconds)}
    with running() as server:
        for engine in ENGINES:
            with tempfile.TemporaryDirectory(prefix="helios-bench-") as directory:
                root, database = Path(directory), None if engine == "sqlite" else server.url("postgres")
                repos = fill(root, database)
                out[engine] = in_process(root, database, repos)
                env = {"HELIOS_HOME": str(root), "HELIOS_REGISTRY__DATABASE": database or ""}
                paths = [f"/{name}/resolve/main/file{n}.txt" for n in range(FILES) for name, _ in repos]
                with started([helios, "registry", "--port", "0"], **env) as (url, pid):
                    out[engine]["head"] = heads(url, pid, paths, rate, seconds)
            print(f"  {engine}: {out[engine]}", file=sys.stderr, flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", choices=("constant",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "constant":
        serve_constant()
        return
    core(1)
    report([one_round(args.rate, args.seconds) for _ in range(args.rounds)], args.rate, args.json)


def report(rounds: list[dict[str, Any]], rate: float, out: Path | None) -> None:
    table = {
        name: {
            way: {key: statistics.median(r[name][way][key] for r in rounds) for key in numbers}
            for way, numbers in ways.items()
        }
        for name, ways in rounds[0].items()
    }
    print(f"{'':22}{'p50 ms':>9}{'p99 ms':>9}{'CPU us':>9}")
    for name, ways in table.items():
        for way, row in ways.items():
            cpu = f"{row['cpu_us']:9.0f}" if "cpu_us" in row else f"{'-':>9}"
            print(f"{name:12}{way:10}{row['p50_ms']:9.3f}{row['p99_ms']:9.3f}{cpu}")
    yard = table["constant"]["head"]
    ratios = {}
    for engine in ENGINES:
        ratios[f"1_ms_to_sql_{engine}"] = 1.0 / table[engine]["sql"]["p50_ms"]
        ratios[f"1_ms_to_head_{engine}"] = 1.0 / table[engine]["head"]["p50_ms"]
        ratios[f"head_p99_{engine}"] = yard["p99_ms"] / table[engine]["head"]["p99_ms"]
    document = {
        "benchmark": "registry_metadata",
        "time": int(time.time()),
        "cores": os.cpu_count(),
        "rate": rate,
        "rounds": rounds,
        "table": table,
        "median": ratios,
    }
    print(f"written to {save(document, out)}", file=sys.stderr)


if __name__ == "__main__":
    main()
