"""A collector of spans: OTLP over HTTP, which decodes what it is sent and refuses what no collector should get."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class Span:
    """Ids in hex, times in nanoseconds. ``kind``: server or client."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    failed: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: tuple[tuple[str, int], ...]
    """Names and times."""


@dataclass
class Collector:
    url: str = ""
    spans: list[Span] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    status: int = 200
    """What it answers; with another one it takes nothing."""
    asked: int = 0
    refused: int = 0
    hold: threading.Event = field(default_factory=threading.Event)
    """While it is not set no answer comes."""

    def of(self, kind: str) -> list[Span]:
        return [span for span in self.spans if span.kind == kind]


class _Handler(BaseHTTPRequestHandler):
    collector: Collector
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_POST(self) -> None:
        found = self.collector
        body = self.rfile.read(int(self.headers["content-length"]))
        found.asked += 1
        found.hold.wait(30)
        status = found.status
        if status == 200:
            if self.path != "/v1/traces" or self.headers["content-type"] != "application/x-protobuf":
                found.problems.append(f"POST {self.path} {self.headers['content-type']}")
            take(found, gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
        else:
            found.refused += 1
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(status)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def take(collector: Collector, body: bytes) -> None:
    """Decode a request and check what every span has to have."""
    request = ExportTraceServiceRequest.FromString(body)
    for group in request.resource_spans:
        resource = _attributes(group.resource.attributes)
        for scope in group.scope_spans:
            for one in scope.spans:
                kind = {2: "server", 3: "client"}.get(one.kind, str(one.kind))
                span = Span(
                    one.name, kind, one.trace_id.hex(), one.span_id.hex(), one.parent_span_id.hex(),
                    one.start_time_unix_nano, one.end_time_unix_nano, one.status.code == 2,
                    _attributes(one.attributes), resource,
                    tuple((event.name, event.time_unix_nano) for event in one.events),
                )  # fmt: skip
                right = len(one.trace_id) == 16 and len(one.span_id) == 8 and any(one.trace_id) and any(one.span_id)
                if not (right and one.name and 0 < span.began <= span.ended and scope.scope.name):
                    collector.problems.append(f"{span}")
                if span.id in {known.id for known in collector.spans}:
                    collector.problems.append(f"twice: {span}")
                collector.spans.append(span)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """One that runs while the block does; at its end it must have found nothing wrong."""
    found = Collector()
    found.hold.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"collector": found}))
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield found
        assert found.problems == []
    finally:
        found.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()
