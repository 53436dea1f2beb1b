"""The router beside a direct run against the same backend, and beside a plain Starlette + aiohttp proxy.

The backend is a protocol on uvloop with one fixed answer, or a stream of events at a fixed pace. The proxy under test
has a core of its own; backend and load generator share another (where there are two). Measured, closed loop:

- whole answers at 1 and at 32 connections: requests a second, p50 and p99, CPU of the proxy for each request;
- streams: 64 at once, 100 events each, one every 10 ms: CPU of the proxy for each event.

What is added to the time of one request is the difference of the p50s at one connection. Absolute figures do not travel
between machines; the ratio to the plain proxy does: it is what everything the router does beyond copying costs.

    python -m benchmarks.router [--seconds 5] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import save

BODY = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "x" * 500}], "max_tokens": 16, "temperature": 0}
).encode()
STREAMED = json.dumps({"model": "m", "messages": [], "stream": True}).encode()
ANSWER = json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "text": "y" * 180}).encode()
EVENT = b"data: " + json.dumps({"id": "chatcmpl-1", "delta": {"content": "token"}, "pad": "z" * 90}).encode() + b"\n\n"
EVENTS, PACE_S, STREAMS = 100, 0.01, 64


def core(number: int) -> None:
    """Pin this process to a core, where there is one of that number."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


# --- the backend -----------------------------------------------------------------------------------------------------


class Backend(asyncio.Protocol):
    """A vLLM that answers at once: /health, /v1/models and a fixed chat completion, whole or streamed."""

    def connection_made(self, transport: Any) -> None:
        import httptools

        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        streamed, self.body = b'"stream": true' in self.body, b""
        if not streamed:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
                + ANSWER
            )
            return
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self.step(EVENTS)

    def step(self, left: int) -> None:
        if self.transport.is_closing():
            return
        if not left:
            self.transport.write(b"0\r\n\r\n")
            return
        self.transport.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
        asyncio.get_running_loop().call_later(PACE_S, self.step, left - 1)


async def serve_backend() -> None:
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


# --- the plain proxy -------------------------------------------------------------------------------------------------


def serve_plain(backend: str) -> None:
    """What a proxy costs with the same libraries and nothing but copying."""
    import aiohttp
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    from helios.http.server import listen_tcp, url_of

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=0)) as session:
            app.state.session = session
            print(url_of(sock, "127.0.0.1"), flush=True)
            yield

    async def chat(request: Request) -> StreamingResponse:
        body = await request.body()
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "content-length", "connection")}
        answer = await request.app.state.session.post(backend + "/v1/chat/completions", data=body, headers=headers)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
        return StreamingResponse(answer.content.iter_any(), answer.status, kept)

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])], lifespan=lifespan)
    sock = listen_tcp("127.0.0.1", 0)
    uvicorn.Server(uvicorn.Config(app, loop="uvloop", http="httptools", log_level="warning", access_log=False)).run(
        [sock]
    )


# --- the load --------------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it is answered, until ``stop``."""

    def __init__(self, request: bytes, until: float, done: asyncio.Future[None]) -> None:
        self.request, self.until, self.done = request, until, done
        self.times: list[float] = []

    def connection_made(self, transport: Any) -> None:
        import httptools

        self.transport = transport
        self.parser = httptools.HttpResponseParser(self)
        self.ask()

    def ask(self) -> None:
        self.began = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        if self.parser.get_status_code() != 200:
            raise RuntimeError(f"status {self.parser.get_status_code()}")
        now = time.perf_counter()
        self.times.append(now - self.began)
        if now < self.until:
            self.ask()
        else:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def load(url: str, body: bytes, connections: int, seconds: float) -> list[float]:
    """Seconds each request took."""
    host, port = url.removeprefix("http://").split(":")
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer key\r\nContent-Length: %d\r\n\r\n" % len(body)
    ) + body
    loop = asyncio.get_running_loop()
    until = time.perf_counter() + seconds
    clients = []
    for _ in range(connections):
        done = loop.create_future()
        _, client = await loop.create_connection(lambda done=done: Client(request, until, done), host, int(port))
        clients.append(client)
    await asyncio.gather(*(client.done for client in clients))
    return [t for client in clients for t in client.times]


def cpu_s(pid: int) -> float:
    """User and system time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- one run ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(command: list[str], number: int) -> Iterator[tuple[str, int]]:
    """A process on a core of its own; its URL (its first line) and pid."""
    env = {**os.environ, "HELIOS_LOG__LEVEL": "warning"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=env, preexec_fn=lambda: core(number)
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.terminate()


def measure(name: str, url: str, pid: int | None, seconds: float) -> dict[str, float]:
    import uvloop

    out: dict[str, float] = {}
    uvloop.run(load(url, BODY, 8, 0.5))  # warm up
    for connections in (1, 32):
        before = cpu_s(pid) if pid else 0.0
        times = sorted(uvloop.run(load(url, BODY, connections, seconds)))
        out[f"rps_{connections}"] = len(times) / seconds
        out[f"p50_ms_{connections}"] = statistics.median(times) * 1e3
        out[f"p99_ms_{connections}"] = times[int(len(times) * 0.99)] * 1e3
        if pid:
            out[f"cpu_us_{connections}"] = (cpu_s(pid) - before) / len(times) * 1e6
    before = cpu_s(pid) if pid else 0.0
    streams = len(uvloop.run(load(url, STREAMED, STREAMS, seconds)))
    if pid:
        out["cpu_us_event"] = (cpu_s(pid) - before) / (streams * EVENTS) * 1e6
    print(f"  {name}: {out['rps_32']:.0f} requests/s", file=sys.stderr, flush=True)
    return out


def one_round(seconds: float) -> dict[str, dict[str, float]]:
    me = [sys.executable, "-m", "benchmarks.router"]
    helios = str(Path(sys.executable).parent / "helios")
    with started([*me, "--role", "backend"], 1) as (backend, _):
        rounds = {"direct": measure("direct", backend, None, seconds)}
        with started([helios, "router", "--port", "0", "--worker", f"m={backend}"], 0) as (url, pid):
            time.sleep(0.5)
            rounds["router"] = measure("router", url, pid, seconds)
        with started([*me, "--role", "plain", "--backend", backend], 0) as (url, pid):
            rounds["plain proxy"] = measure("plain proxy", url, pid, seconds)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", choices=("backend", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "backend":
        import uvloop

        uvloop.run(serve_backend())
    elif args.role == "plain":
        serve_plain(args.backend)
    else:
        core(1)
        report([one_round(args.seconds) for _ in range(args.rounds)], args.json)


def report(rounds: list[dict[str, dict[str, float]]], out: Path | None) -> None:
    median = {
        name: {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]} for name in rounds[0]
    }
    columns = ("rps_1", "p50_ms_1", "p99_ms_1", "rps_32", "p50_ms_32", "p99_ms_32", "cpu_us_32", "cpu_us_event")
    print(f"{'':12}" + "".join(f"{column:>14}" for column in columns))
    for name, row in median.items():
        shown = (f"{row[c]:14.2f}" if c in row else f"{'-':>14}" for c in columns)
        print(f"{name:12}" + "".join(shown))
    router, plain, direct = median["router"], median["plain proxy"], median["direct"]
    ratios = {
        "requests_to_plain": plain["cpu_us_32"] / router["cpu_us_32"],
        "events_to_plain": plain["cpu_us_event"] / router["cpu_us_event"],
    }
    added = {name: median[name]["p50_ms_1"] - direct["p50_ms_1"] for name in ("router", "plain proxy")}
    print("added to one request (p50): " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in added.items()))
    print(f"requests per CPU second, router to plain proxy: {ratios['requests_to_plain']:.2f}")
    print(f"events per CPU second, router to plain proxy: {ratios['events_to_plain']:.2f}")
    document = {
        "benchmark": "router",
        "time": int(time.time()),
        "cores": os.cpu_count(),
        "rounds": rounds,
        "median": {**ratios, "added_ms": added, "table": median},
    }
    print(f"written to {save(document, out)}", file=sys.stderr)


if __name__ == "__main__":
    main()
