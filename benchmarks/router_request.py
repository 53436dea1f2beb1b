"""What one relayed request costs in Python: the router's own code between two sockets that are none.

Both ends are transports that keep nothing, so no kernel, no other process and no clock of theirs is in it: what is left
is the work of parsing, admission, choosing, relaying and counting, in microseconds of this process's CPU. The fastest
of many short runs counts: what disturbs only ever adds. With ``--profile`` it shows where the time goes.

    python -m benchmarks.router_request [--requests 2000] [--runs 15] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
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
from benchmarks.router_backend import ANSWER, BODY, EVENT, STREAMED
from benchmarks.router_load import request_of
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


def settings_of(variant: str, work: Path) -> tuple[RouterSettings, str]:
    """The settings and the key that clients send."""
    given: dict[str, Any] = {"workers": [{"model": "m", "url": "http://127.0.0.1:1"}]}
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
    """One client's connection and one worker's."""

    def __init__(self, settings: RouterSettings, key: str, processes: int = 1) -> None:
        async def gather() -> bytes | None:
            return None

        shared = Sharing(Board.make(1, LOADS + cells.COLUMNS), Board.make(1, sums.COLUMNS), 0)
        router = Router(
            settings, ssl.create_default_context(), gather, lambda name: None, lambda model: None, lambda models: None,
            shared, lambda url: Health(time.monotonic), processes, say=None if processes == 1 else lambda word: None,
        )  # fmt: skip
        (worker,) = router.workers.all
        worker.health.judged(State.UP, "")
        config = make_config(router.app, http=relaying(router.relay, RAW_ROUTES), loop="uvloop", date_header=False)
        config.load()
        made: Any = config.http_protocol_class
        self.client = made(config, _server_state(), {}, asyncio.get_running_loop())
        self.connection = Connection(router.relay.pool, worker)
        self.to_client, self.to_worker = Nowhere(), Nowhere()
        self.client.connection_made(self.to_client)
        self.connection.connection_made(self.to_worker)
        router.relay.pool.keep(self.connection)
        self.request, self.answer = request_of(BODY, key), HEAD + ANSWER
        self.streamed = request_of(STREAMED, key)

    def one(self) -> None:
        self.client.data_received(self.request)
        self.connection.data_received(self.answer)

    def stream(self) -> float:
        """A streamed answer; returns microseconds for each of its pieces."""
        self.client.data_received(self.streamed)
        self.connection.data_received(STREAM)
        begin = time.process_time()
        for _ in range(PIECES):
            self.connection.data_received(PIECE)
        took = time.process_time() - begin
        self.connection.data_received(b"0\r\n\r\n")
        return took / PIECES * 1e6

    def check(self) -> None:
        before = self.to_client.written, self.to_worker.written
        self.one()
        got, sent = self.to_client.written - before[0], self.to_worker.written - before[1]
        if got < len(ANSWER) + 100 or sent < len(BODY) + 100:
            raise SystemExit(f"nothing was relayed: {got} bytes to the client, {sent} to the worker")


def _server_state() -> Any:
    from uvicorn.server import ServerState

    return ServerState()


async def measure(variant: str, requests: int, runs: int, profile: bool) -> tuple[list[float], list[float]]:
    """Microseconds a request, and a piece of a stream, for each run."""
    with tempfile.TemporaryDirectory(prefix="helios-bench-") as work:
        scene = Scene(*settings_of(variant, Path(work)), 2 if variant.endswith("of two") else 1)
        for _ in range(20):
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
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="of the last variant")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    for variant in VARIANTS:
        profile = args.profile and variant == VARIANTS[-1]
        times, pieces = uvloop.run(measure(variant, args.requests, args.runs, profile))
        rows[variant] = {"request_us": min(times), "median_us": statistics.median(times), "piece_us": min(pieces)}
        shown_as = (
            f"a request {min(times):6.1f} us (median {statistics.median(times):6.1f}), a piece {min(pieces):5.2f} us"
        )
        print(f"{variant:32} {shown_as}")
    result = {"benchmark": "router_request", "time": int(time.time()), "median": rows}
    print(f"written to {save(result, args.json)}", file=sys.stderr)


if __name__ == "__main__":
    main()
