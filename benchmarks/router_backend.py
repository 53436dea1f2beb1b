"""What stands behind the proxies that are measured, and the plainest of them.

The backend is a vLLM that answers at once: a protocol on uvloop with one fixed answer, or a stream of events at a fixed
pace. Whole answers come from nginx instead, which takes less of the core that it shares with the load. Several workers
are one process that listens on several ports, so that their number takes nothing of that core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.nginx import free_ports, nginx

BODY = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "x" * 500}], "max_tokens": 16, "temperature": 0}
).encode()
STREAMED = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
_CHOICE = {"index": 0, "message": {"role": "assistant", "content": "y" * 60}, "finish_reason": "stop"}
_USAGE = {"prompt_tokens": 90, "completion_tokens": 16, "total_tokens": 106}
_DELTA = {"index": 0, "delta": {"content": "token"}, "finish_reason": None}
_ABOUT = {"id": "chatcmpl-1", "created": 1, "model": "m"}
ANSWER = json.dumps({**_ABOUT, "object": "chat.completion", "choices": [_CHOICE], "usage": _USAGE}).encode()
EVENT = b"data: " + json.dumps({**_ABOUT, "object": "chat.completion.chunk", "choices": [_DELTA]}).encode() + b"\n\n"
"""About 300 and 180 bytes, as vLLM's are."""
STREAM = re.compile(rb'"stream": ?true')  # some write the body anew
EVENTS, PACE_S = 100, 0.01
MODELS = json.dumps(
    {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "vllm"}]}
).encode()
METRICS = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
"""What nginx says of itself: it answers at once."""
LOCATIONS = "\n".join(
    f"location {path} {{ default_type application/json; return 200 '{content.decode()}'; }}"
    for path, content in (("/v1/models", MODELS), ("/metrics", METRICS), ("/", ANSWER))
)


class Backend(asyncio.Protocol):
    """A vLLM that answers at once: /health, /v1/models and a fixed chat completion, whole or streamed."""

    events, pace_s = EVENTS, PACE_S

    def connection_made(self, transport: Any) -> None:
        import httptools

        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.body = self.path = b""

    def data_received(self, data: bytes) -> None:
        import httptools

        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:  # some ask whether this is gRPC
            self.transport.close()

    def on_url(self, url: bytes) -> None:
        self.path = url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        streamed, self.body = STREAM.search(self.body) is not None, b""
        if not streamed:
            content = MODELS if self.path == b"/v1/models" else ANSWER
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content)
                + content
            )
            return
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self.step(self.events)

    def step(self, left: int) -> None:
        if self.transport.is_closing():
            return
        if not left:
            self.transport.write(b"0\r\n\r\n")
            return
        self.transport.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
        asyncio.get_running_loop().call_later(self.pace_s, self.step, left - 1)


@contextlib.asynccontextmanager
async def backends(count: int, protocol: type[asyncio.Protocol] = Backend) -> AsyncIterator[list[str]]:
    """So many workers in this process; their URLs."""
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for _ in range(count):
            server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=4096)
            stack.callback(server.close)
            urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield urls


async def serve_backends(count: int, events: int, pace_s: float) -> None:
    """Until the process is ended; prints their URLs in one line."""
    async with backends(count, type("Paced", (Backend,), {"events": events, "pace_s": pace_s})) as urls:
        print(*urls, flush=True)
        await asyncio.Event().wait()


@contextlib.contextmanager
def whole_answers(work: Path, count: int = 1) -> Iterator[list[str]]:
    """nginx with the fixed answer for every path, one process on this process's cores, as so many workers; yields
    their URLs."""
    ports = free_ports(count)
    others = "".join(f"listen 127.0.0.1:{port};\n" for port in ports[1:])
    with nginx(work, others + LOCATIONS, port=ports[0], workers=1):
        yield [f"http://127.0.0.1:{port}" for port in ports]


def serve_plain(workers: Sequence[str]) -> None:
    """What a proxy costs with the same libraries and nothing but copying, to the workers in turn: Starlette on uvicorn,
    and aiohttp."""
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

    turns = itertools.cycle([f"{worker}/v1/chat/completions" for worker in workers])

    async def chat(request: Request) -> StreamingResponse:
        body = await request.body()
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "content-length", "connection")}
        answer = await request.app.state.session.post(next(turns), data=body, headers=headers)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
        return StreamingResponse(answer.content.iter_any(), answer.status, kept)

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])], lifespan=lifespan)
    sock = listen_tcp("127.0.0.1", 0)
    uvicorn.Server(uvicorn.Config(app, loop="uvloop", http="httptools", log_level="warning", access_log=False)).run(
        [sock]
    )


async def answers(url: str, key: str = "key", within_s: float = 120.0) -> None:
    """Wait until a chat request is answered."""
    from benchmarks.router_load import closed

    until = time.monotonic() + within_s
    while True:
        try:
            await closed(url, (BODY,), 1, 0, key)
            return
        except (OSError, RuntimeError) as error:
            if time.monotonic() > until:
                raise SystemExit(f"{url} does not answer: {error}") from None
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", metavar="WORKER", nargs="+", help="be the plain proxy of these workers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--events", type=int, default=EVENTS)
    parser.add_argument("--pace", type=float, default=PACE_S)
    args = parser.parse_args()
    if args.plain:
        serve_plain(args.plain)
    else:
        uvloop.run(serve_backends(args.workers, args.events, args.pace))
