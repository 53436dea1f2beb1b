"""Bodies made of several file parts, on real sockets."""

import asyncio
import contextlib
import http.client
import logging
import os
import threading

import pytest

from helios.errors import IntegrityError
from helios.http.server import FilePart, FilePartsResponse, listen_tcp, make_server


class Served:
    """An application whose parts and behaviour the test sets."""

    def __init__(self, path) -> None:
        self.path = path
        self.content = os.urandom(3_000_000)
        path.write_bytes(self.content)
        self.cut: int | None = None
        self.closed = 0
        self.sent: list[int] = []

    def wait(self, condition) -> None:
        for _ in range(200):
            if condition():
                return
            threading.Event().wait(0.05)
        raise AssertionError("it did not happen")

    async def parts(self):
        with self.path.open("rb") as file:
            try:
                for number, (start, stop) in enumerate([(10, 1_000_000), (0, 10), (1_000_000, 3_000_000)]):
                    if number == self.cut:
                        raise IntegrityError("bad chunk")
                    await asyncio.sleep(0)
                    yield FilePart(file, start, stop - start)
            finally:
                self.closed += 1

    async def __call__(self, scope, receive, send):
        response = FilePartsResponse(self.parts(), 3_000_000, 200, [("x-kind", "parts")])
        try:
            await response(scope, receive, send)
        except IntegrityError:
            await send({"type": "http.response.start", "status": 502, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.sent.append(response.sent)


@pytest.fixture
def served(tmp_path):
    app = Served(tmp_path / "file")

    async def root(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await app(scope, receive, send)

    sock = listen_tcp("127.0.0.1", 0)
    server = make_server(root)
    server.capture_signals = contextlib.nullcontext  # not the main thread
    thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[sock]),))
    thread.start()
    app.port = sock.getsockname()[1]
    yield app
    server.stop()
    thread.join(20)
    sock.close()


def request(served, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:
        connection.request(method, "/")
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


def test_parts_leave_in_order(served):
    status, headers, body = request(served)
    c = served.content
    assert (status, headers["content-length"], headers["x-kind"]) == (200, "3000000", "parts")
    assert body == c[10:1_000_000] + c[:10] + c[1_000_000:]
    assert request(served, "HEAD")[2] == b""
    served.wait(lambda: sorted(served.sent) == [0, 3_000_000])


def test_an_error_before_the_first_part_is_an_answer(served):
    served.cut = 0
    assert request(served)[0] == 502
    served.wait(lambda: served.closed == 1)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_later_error_cuts_the_body_short(served, cut, caplog):
    served.cut = cut
    with caplog.at_level(logging.WARNING), pytest.raises((http.client.IncompleteRead, ConnectionError)):
        request(served)
    served.cut = None
    assert request(served)[0] == 200
    served.wait(lambda: served.closed == 2)
    assert "cut short" in caplog.text


def test_a_client_that_leaves_ends_the_parts(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("GET", "/")
    connection.getresponse().read(10)
    connection.close()
    assert request(served)[0] == 200
    served.wait(lambda: served.closed == 2)
