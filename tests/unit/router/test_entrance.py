"""Requests that the router answers itself: their ids, and their spans."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from router import errors
from router.answering import refusal
from router.entrance import Entrance
from router.tracing.recorder import Recorder
from router.tracing.spans import envelope, spans_of
from tests.support.otlp import Collector, Span, take

TRACE, CALLER = "7" * 32, "8" * 16
PARENT = b"00-" + TRACE.encode() + b"-" + CALLER.encode()


async def one(request: Request) -> Response:
    return JSONResponse({})


async def probed(request: Request) -> Response:
    return JSONResponse({})


async def refused(request: Request) -> Response:
    return refusal(request, errors.no_such("File", "x", "file_id"))


async def broken(request: Request) -> Response:
    raise RuntimeError("a bug")


async def endless(request: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b"piece"
            await asyncio.sleep(0)

    return StreamingResponse(pieces())


async def short(request: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"piece"
        raise RuntimeError("a bug")

    return StreamingResponse(pieces())


async def internal(request: Request, exception: Exception) -> Response:
    return refusal(request, errors.internal())


ROUTES = [
    Route("/v1/one/{name}", one, methods=["GET"]),
    Route("/v1/refused", refused),
    Route("/v1/broken", broken),
    Route("/v1/endless", endless),
    Route("/v1/short", short),
    Route("/healthz", probed),
    Route("/readyz", probed),
    Route("/metrics", probed),
]


class Site:
    """The entrance of an application, its requests and its spans."""

    def __init__(self, *, traced: bool = True, ratio: float = 1.0, most: int = 16) -> None:
        self.dropped: list[float] = []
        self.now = 100.0
        ids, bits = iter(range(1, 1000)), iter(range(1, 1000))
        recorder = Recorder(
            ratio, most, lambda size: next(ids), self.dropped.append, self._later, lambda: 10**18
        )  # fmt: skip
        self.recorder = recorder if traced else None
        app = Starlette(routes=ROUTES, exception_handlers={Exception: internal})
        self.app = Entrance(app, ROUTES, self.recorder, lambda size: next(bits))

    def _later(self) -> float:
        self.now += 1
        return self.now

    def ask(
        self, path: str, headers: Sequence[tuple[bytes, bytes]] = (), *, method: str = "GET", leaves: bool = False
    ) -> list[Any]:
        """What was sent of the answer. ``leaves``: the client does once it has some of it."""
        sent: list[Any] = []
        some = asyncio.Event()

        async def receive() -> Any:
            await (some if leaves else asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                some.set()

        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"secret=1",
            "headers": list(headers), "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        }  # fmt: skip
        asyncio.run(self.app(scope, receive, send))
        return sent

    def spans(self) -> list[Span]:
        """All so far, as a collector sees them."""
        assert self.recorder is not None
        collector = Collector()
        for request in self.recorder.take(100):
            take(collector, envelope().of(spans_of(request, "http")))
        assert collector.problems == []
        return collector.spans


def identity(sent: list[Any]) -> bytes:
    """That of an answer, which has one."""
    (found,) = [value for name, value in sent[0]["headers"] if name == b"x-request-id"]
    return bytes(found)


def test_a_request_has_a_span_that_goes_on_with_the_clients_trace() -> None:
    site = Site()
    sent = site.ask("/v1/one/two", [(b"traceparent", PARENT + b"-01"), (b"x-request-id", b"mine")])
    (span,) = site.spans()
    assert (span.kind, span.name, span.trace, span.parent) == ("server", "GET /v1/one/{name}", TRACE, CALLER)
    assert span.attributes == {
        "http.request.method": "GET", "http.route": "/v1/one/{name}", "url.path": "/v1/one/two", "url.scheme": "http",
        "http.response.status_code": 200, "helios.request.id": "mine",
    }  # fmt: skip
    assert (identity(sent), span.failed, span.ended - span.began) == (b"mine", False, 10**9)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize(("path", "status"), [("/v1/one/a", 200), ("/v1/refused", 404), ("/v1/none", 404)])
def test_an_answer_has_the_id_of_its_request(path: str, status: int, traced: bool) -> None:
    site = Site(traced=traced)
    sent = site.ask(path)
    assert (sent[0]["status"], identity(sent)) == (status, b"%032x" % 1)
    if traced:
        (span,) = site.spans()
        assert (span.attributes["helios.request.id"], span.parent, span.failed) == (f"{1:032x}", "", False)


def test_probes_have_no_span() -> None:
    site = Site()
    for path in ("/healthz", "/readyz", "/metrics"):
        assert site.ask(path)[0]["status"] == 200
    assert site.spans() == []


def test_what_matches_no_route_makes_no_names() -> None:
    site = Site()
    assert site.ask("/v1/" + "none" * 1000)[0]["status"] == 404
    assert site.ask("/v1/one/a", method="PROPFIND")[0]["status"] == 405
    nowhere, other = site.spans()
    assert (nowhere.name, len(nowhere.attributes["url.path"])) == ("GET", 256)
    assert "http.route" not in nowhere.attributes
    assert (other.name, other.attributes["http.request.method"]) == ("HTTP /v1/one/{name}", "_OTHER")
    assert other.attributes["http.request.method_original"] == "PROPFIND"


@pytest.mark.parametrize(
    ("path", "leaves", "status", "error"),
    [
        ("/v1/broken", False, 500, "500"),
        ("/v1/short", False, 200, "broken_off"),
        ("/v1/endless", True, 200, "client_gone"),
    ],
)
def test_what_went_wrong_is_said(path: str, leaves: bool, status: int, error: str) -> None:
    site = Site()
    if path == "/v1/endless":
        site.ask(path, leaves=leaves)
    else:
        with pytest.raises(BaseException, match=r"a bug|unhandled errors"):
            site.ask(path, leaves=leaves)
    (span,) = site.spans()
    said = span.attributes
    assert (said["http.response.status_code"], said["error.type"], span.failed) == (status, error, True)


def test_what_is_recorded_is_the_clients_to_say_and_else_a_share() -> None:
    site = Site(ratio=0.0)
    site.ask("/v1/refused", [(b"traceparent", PARENT + b"-00")])
    site.ask("/v1/refused")
    assert site.spans() == []
    site.ask("/v1/refused", [(b"traceparent", PARENT + b"-01")])
    assert [span.trace for span in site.spans()] == [TRACE]


def test_one_that_finds_the_queue_full_is_counted() -> None:
    site = Site(most=1)
    site.ask("/v1/one/a")
    site.ask("/v1/one/b")
    assert (len(site.spans()), site.dropped) == (1, [1])
