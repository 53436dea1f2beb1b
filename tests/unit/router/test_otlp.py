"""Spans in OTLP's encoding, read by OpenTelemetry's own classes, and how they are sent."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from helios.errors import UsageError
from router.tracing import collector as module
from router.tracing.collector import Collector, pairs_of
from router.tracing.otlp import CLIENT, SERVER, Envelope, attribute, span
from router.tracing.spans import envelope
from tests.support.certificates import Authority

TEXTS = st.text(st.characters(codec="utf-8"), max_size=300)
VALUES = TEXTS | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
ATTRIBUTES = st.dictionaries(TEXTS.filter(bool), VALUES, max_size=6)
TIMES = st.integers(0, 2**64 - 1)
IDS = st.binary(min_size=8, max_size=8)


def read(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@given(
    st.binary(min_size=16, max_size=16), IDS, IDS | st.just(b""), st.tuples(TIMES, TIMES), ATTRIBUTES, ATTRIBUTES,
    st.lists(st.tuples(TEXTS, TIMES), max_size=3), st.booleans(), st.booleans(), st.sampled_from([SERVER, CLIENT]),
    TEXTS,
)  # fmt: skip
def test_what_is_written_is_what_opentelemetry_reads(
    trace: bytes, own: bytes, parent: bytes, times: tuple[int, int], attributes: dict[str, Any], once: dict[str, Any],
    events: list[tuple[str, int]], failed: bool, remote: bool, kind: int, name: str,
) -> None:  # fmt: skip
    ids = trace.hex().encode(), own.hex().encode(), parent.hex().encode()
    once = {key: value for key, value in once.items() if key not in attributes}
    one = span(name, kind, *ids, times, attributes, once, failed=failed, remote=remote, events=events)
    request = ExportTraceServiceRequest.FromString(Envelope({"a": 1}, "scope", "0").of([one, one]))
    (group,) = request.resource_spans
    assert read(group.resource.attributes) == {"a": 1}
    (scoped,) = group.scope_spans
    assert (scoped.scope.name, scoped.scope.version) == ("scope", "0")
    found, twin = scoped.spans
    assert found == twin
    assert (found.trace_id, found.span_id, found.parent_span_id) == (trace, own, parent)
    assert (found.name, found.kind) == (name, kind)
    assert (found.start_time_unix_nano, found.end_time_unix_nano) == times
    assert [(event.name, event.time_unix_nano) for event in found.events] == events
    assert read(found.attributes) == attributes | once
    types = {key: type(value) for key, value in (attributes | once).items()}
    assert {key: type(value) for key, value in read(found.attributes).items()} == types
    assert (found.status.code == 2, found.flags) == (failed, 0x301 if remote else 0x101)


def test_text_that_is_no_unicode_is_replaced() -> None:
    assert b"?" in attribute("a", "\udc80")


def test_the_environment_names_the_service() -> None:
    def resource(**environ: str) -> dict[str, Any]:
        request = ExportTraceServiceRequest.FromString(envelope(environ).of([]))
        return read(request.resource_spans[0].resource.attributes)

    assert resource()["service.name"] == "helios-router"
    said = "service.name=a,deployment.environment.name=a%20b, =c,d"
    assert resource(OTEL_RESOURCE_ATTRIBUTES=said)["service.name"] == "a"
    assert resource(OTEL_RESOURCE_ATTRIBUTES=said)["deployment.environment.name"] == "a b"
    assert resource(OTEL_RESOURCE_ATTRIBUTES=said, OTEL_SERVICE_NAME="b")["service.name"] == "b"
    assert pairs_of("") == {}


@dataclass
class Peer:
    """A server that answers what it is told, then 200."""

    url: str = ""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    seen: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@contextlib.contextmanager
def peer(*answers: tuple[int, dict[str, str]], tls: ssl.SSLContext | None = None) -> Iterator[Peer]:
    found = Peer(answers=list(answers))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.seen.append(({key.lower(): value for key, value in self.headers.items()}, body))
            status, headers = found.answers.pop(0) if found.answers else (200, {})
            self.send_response(status)
            for pair in headers.items():
                self.send_header(*pair)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    found.url = f"http{'' if tls is None else 's'}://127.0.0.1:{server.server_port}/v1/traces"
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_a_collector_can_not_take_now_is_sent_again(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    with peer((status, {}), (status, {"retry-after": "1"})) as found:
        began = time.monotonic()
        assert Collector(found.url, 20, {}).send(b"spans")
        assert time.monotonic() - began > 1
    assert [body for _, body in found.seen] == [b"spans"] * 3
    assert found.seen[0][0]["content-type"] == "application/x-protobuf"


@pytest.mark.parametrize("answer", [(400, {}), (401, {}), (500, {}), (307, {"location": "http://127.0.0.1:9/"})])
def test_a_refusal_is_final(answer: tuple[int, dict[str, str]]) -> None:
    with peer(answer) as found:
        assert not Collector(found.url, 20, {}).send(b"spans")
    assert len(found.seen) == 1


def test_the_end_comes_within_the_timeout_and_at_once_when_closed() -> None:
    with peer(*[(503, {"retry-after": "30"})] * 5) as found:
        began = time.monotonic()
        assert not Collector(found.url, 2, {}).send(b"spans")
        one = Collector(found.url, 60, {})
        threading.Timer(0.2, one.close).start()
        assert not one.send(b"spans")
        assert time.monotonic() - began < 10
    with peer() as gone:
        pass
    assert not Collector(gone.url, 0.5, {}).send(b"spans")


def test_headers_and_compression_are_those_of_the_environment() -> None:
    environ = {
        "OTEL_EXPORTER_OTLP_HEADERS": "x-key=a%3Db,x-other=1",
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "gzip",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
    }
    with peer() as found:
        assert Collector(found.url, 20, environ).send(b"spans" * 1000)
    ((headers, body),) = found.seen
    assert (headers["x-key"], headers["x-other"], headers["content-encoding"]) == ("a=b", "1", "gzip")
    assert body[:2] == b"\x1f\x8b"
    assert len(body) < 500


def test_a_collector_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "collectors")
    pair = authority.issue("collector", "127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert, pair.key)
    with peer(tls=context) as found:
        assert not Collector(found.url, 0.5, {}).send(b"spans"), "who knows it?"
        assert Collector(found.url, 20, {"OTEL_EXPORTER_OTLP_CERTIFICATE": authority.path}).send(b"spans")
    with pytest.raises(UsageError, match="OTEL_EXPORTER_OTLP_CERTIFICATE"):
        Collector(found.url, 20, {"OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "none")})
