"""What one relayed request costs in Python: the router's own code between two sockets that are none.

Both ends are transports that keep nothing, so no kernel, no other process and no clock of theirs is in it: what is left
is the work of parsing, admission, choosing among ``--workers`` workers for prompts that differ
(benchmarks/router_prompts.py), relaying and counting, in microseconds of this process's CPU. The fastest of many short
runs counts: what disturbs only ever adds. With ``--profile`` it shows where the time goes.

    python -m benchmarks.router_request [--workers 4] [--requests 2000] [--runs 15] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import itertools
import pstats
import ssl
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.common import save
from benchmarks.router_backend import ANSWER, EVENT
from benchmarks.router_load import request_of
from benchmarks.router_prompts import bodies
from helios.config import RouterSettings
from helios.decoding import converted
from helios.http.server import make_config
from router.admission import sums
from router.admission.keys import create
from router.app import Router
from router.health import Health, State
from router.processes.board import LOADS, Board
from router.processes.sharing import Sharing
from router.relay.protocol import relaying
from router.relay.upstream import Connection
from router.resilience import cells
from router.routes import RAW_ROUTES

HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ndate: Sun, 29 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %d\r\n"
    b"content-type: application/json\r\n\r\n" % len(ANSWER)
)
"""As vLLM answers."""
STREAM: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
PIECE: Final = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
PIECES: Final = 200
VARIANTS: Final = (
    "round-robin, nothing else", "prefix-cache", "prefix-cache, a queue", "prefix-cache, a queue of two",
    "prefix-cache, keys and limits",
)  # fmt: skip
"""With a queue in which nobody has to wait: of the one process, or of two together. The last one is what the other
benchmarks of the router run with."""


class Nowhere(asyncio.Transport):
    """A connection whose other end takes everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def write(self, data: Any) -> None:
        self.written += len(data)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def abort(self) -> None:
        raise SystemExit("the router gave a connection up")

    close = abort


class ToWorker(Nowhere):
    """A worker's end: says which one was asked last."""

    def __init__(self, scene: Scene, connection: Connection) -> None:
        super().__init__()
        self.scene, self.connection = scene, connection

    def write(self, data: Any) -> None:
        self.scene.asked = self.connection
        self.written += len(data)


def settings_of(variant: str, work: Path, workers: int) -> tuple[RouterSettings, str]:
    """The settings and the key that clients send."""
    urls = [f"http://127.0.0.1:{n + 1}" for n in range(workers)]
    given: dict[str, Any] = {"workers": [{"model": "m", "url": url} for url in urls]}
    key = "key"
    if variant.startswith("round-robin"):
        given["policy"] = "round-robin"
    if "a queue" in variant:
        given["admission"] = {"queue": {"per_worker": 1000}}
    if variant.endswith("limits"):
        limits = {"requests_per_minute": 1e12, "tokens_per_minute": 1e15}
        _, key = create(work / "keys.json", "bench", time.time(), limits=limits)
        given["admission"] = {"keys": str(work / "keys.json")}
    return converted(given, RouterSettings), key


class Scene:
    """One client's connection and one of each worker."""

    asked: Connection
    """That of the worker that got the last request."""

    def __init__(self, settings: RouterSettings, key: str, processes: int = 1) -> None:
        async def gather() -> bytes | None:
            return None

        shared = Sharing(Board.make(1, LOADS + cells.COLUMNS), Board.make(1, sums.COLUMNS), 0)
        router = Router(
            settings, ssl.create_default_context(), gather, lambda name: None, lambda model: None, lambda models: None,
            shared, lambda url: Health(time.monotonic), processes, lambda models: None,
            say=None if processes == 1 else lambda word: None,
        )  # fmt: skip
        config = make_config(router.app, http=relaying(router.relay, RAW_ROUTES), loop="uvloop", date_header=False)
        config.load()
        made: Any = config.http_protocol_class
        self.client = made(config, _server_state(), {}, asyncio.get_running_loop())
        self.to_client, self.to_workers = Nowhere(), list[ToWorker]()
        self.client.connection_made(self.to_client)
        for worker in router.workers.all:
            worker.health.judged(State.UP, "")
            connection = Connection(router.relay.pool, worker)
            self.to_workers.append(ToWorker(self, connection))
            connection.connection_made(self.to_workers[-1])
            router.relay.pool.keep(connection)
        self.requests = itertools.cycle([request_of(body, key) for body in bodies()])
        self.streamed = itertools.cycle([request_of(body, key) for body in bodies(stream=True)])
        self.answer = HEAD + ANSWER

    def one(self) -> None:
        self.client.data_received(next(self.requests))
        self.asked.data_received(self.answer)

    def stream(self) -> float:
        """A streamed answer; returns microseconds for each of its pieces."""
        self.client.data_received(next(self.streamed))
        self.asked.data_received(STREAM)
        took = self.passed(self.asked)
        self.asked.data_received(b"0\r\n\r\n")
        return took / PIECES * 1e6

    def passed(self, connection: Connection) -> float:
        """Seconds that all pieces of one stream take."""
        begin = time.process_time()
        for _ in range(PIECES):
            connection.data_received(PIECE)
        return time.process_time() - begin

    def check(self) -> None:
        """Ask for every prompt once. Raises SystemExit where answers fail, or some worker is never asked."""
        for body in bodies():
            before = self.to_client.written, self.sent()
            self.one()
            got, sent = self.to_client.written - before[0], self.sent() - before[1]
            if got < len(ANSWER) + 100 or sent < len(body) + 100:
                raise SystemExit(f"nothing was relayed: {got} bytes to the client, {sent} to the workers")
        if idle := sum(not end.written for end in self.to_workers):
            raise SystemExit(f"{idle} of {len(self.to_workers)} workers were never asked: nothing is decided")

    def sent(self) -> int:
        """Bytes to all workers."""
        return sum(end.written for end in self.to_workers)


def _server_state() -> Any:
    from uvicorn.server import ServerState

    return ServerState()


async def measure(
    variant: str, workers: int, requests: int, runs: int, profile: bool
) -> tuple[list[float], list[float]]:
    """Microseconds a request, and a piece of a stream, for each run."""
    with tempfile.TemporaryDirectory(prefix="helios-bench-") as work:
        scene = Scene(*settings_of(variant, Path(work), workers), 2 if variant.endswith("of two") else 1)
        scene.check()
        if profile:
            shown(scene, requests)
        times, pieces = [], []
        for _ in range(runs):
            pieces.append(statistics.median(scene.stream() for _ in range(30)))
            begin = time.process_time()
            for _ in range(requests):
                scene.one()
            times.append((time.process_time() - begin) / requests * 1e6)
            await asyncio.sleep(0)
        return times, pieces


def shown(scene: Scene, requests: int) -> None:
    """Print what takes the most, and how many calls a request makes."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(requests):
        scene.one()
    profiler.disable()
    stats: Any = pstats.Stats(profiler)
    print(f"{stats.total_calls / requests:.0f} calls a request")
    stats.sort_stats("tottime").print_stats(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="of the last variant")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    print(f"{args.workers} worker{'s' * (args.workers > 1)} behind the router")
    for variant in VARIANTS:
        profile = args.profile and variant == VARIANTS[-1]
        times, pieces = uvloop.run(measure(variant, args.workers, args.requests, args.runs, profile))
        rows[variant] = {"request_us": min(times), "median_us": statistics.median(times), "piece_us": min(pieces)}
        shown_as = (
            f"a request {min(times):6.1f} us (median {statistics.median(times):6.1f}), a piece {min(pieces):5.2f} us"
        )
        print(f"{variant:32} {shown_as}")
    result = {"benchmark": "router_request", "time": int(time.time()), "workers": args.workers, "median": rows}
    print(f"written to {save(result, args.json)}", file=sys.stderr)


if __name__ == "__main__":
    main()
