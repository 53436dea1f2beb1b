"""A collector of spans that reads what it is sent and drops it: the end of the traces of a router that is measured.

It speaks as much of OTLP over HTTP as an exporter needs: whatever comes, it is taken. It decodes nothing, since it runs
on the core of the load.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import urllib.request
from typing import Any, Final

import uvloop

TAKEN: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n"
"""An empty answer is the protocol's message that nothing was refused."""
_COUNT: Final = re.compile(r'^helios_router_spans_total\{result="(\w+)"\} (\S+)$', re.MULTILINE)


class Sink(asyncio.Protocol):
    """One exporter's connection."""

    def connection_made(self, transport: Any) -> None:
        import httptools

        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.transport.write(TAKEN)


async def sink(port: int) -> asyncio.Server:
    """One that listens on this port of loopback; 0: a free one."""
    return await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", port)


def sent_of(metrics: str) -> float | None:
    """Of the spans that a router recorded, by its metrics, the share that the collector took; None: it recorded none.

    Those that still wait to be sent do not count.
    """
    counts = {result: float(count) for result, count in _COUNT.findall(metrics)}
    total = sum(counts.values())
    return counts.get("sent", 0.0) / total if total else None


def metrics_of(url: str) -> str:
    """A router's metrics. Raises OSError."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url + "/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
    return text


async def serve(port: int) -> None:
    server = await sink(port)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int, help="0: a free one")
    uvloop.run(serve(parser.parse_args().port))
