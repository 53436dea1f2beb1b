"""A worker that answers before it has the request's body: the answer counts, and the connection is not used again."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from tests.support.plain_worker import Handler, working
from tests.support.routing import StartRouter, start_router

__all__ = ["start_router"]
BIG = 8 << 20
REFUSAL = json.dumps({"error": {"message": "too long for me", "code": "from_the_worker"}}).encode()
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + b"x" * BIG + b"\r\n--b--\r\n"
)
BODIES = {
    "a form": ("/v1/audio/transcriptions", FORM, "multipart/form-data; boundary=b"),
    "json": ("/v1/completions", json.dumps({"model": "m", "prompt": "x" * BIG}).encode(), "application/json"),
    "short json": ("/v1/completions", json.dumps({"model": "m", "prompt": "x"}).encode(), "application/json"),
}


@pytest.mark.parametrize(
    ("name", "keeps"),
    [("a form", True), ("a form", False), ("json", True), ("short json", True), ("short json", False)],
)
def test_a_worker_that_answers_early(start_router: StartRouter, name: str, keeps: bool) -> None:
    over = threading.Event()
    connections: list[object] = []

    def serve(handler: Handler) -> None:
        connections.append(handler.client_address)
        if len(connections) == 1:
            if not keeps:
                handler.close_connection = True
            handler.say(REFUSAL, 413)
            if not keeps:
                handler.connection.shutdown(socket.SHUT_WR)
            if name == "short json" and keeps:  # it came with the head: the connection is as good as ever
                handler.rfile.read(int(handler.headers["content-length"]))
            else:
                over.wait(30)
                handler.close_connection = True
        else:
            size = int(handler.headers["content-length"])
            while size:
                size -= len(handler.rfile.read(min(size, 1 << 20)))
            handler.say(b'{"model": "m"}')

    path, body, kind = BODIES[name]
    with working(serve) as worker:
        router = start_router(worker.url)
        try:
            answer = router.request("POST", path, body, {"content-type": kind})
            assert (answer.status, answer.json()["error"]["code"]) == (413, "from_the_worker")
            again = router.request("POST", path, body, {"content-type": kind})
            assert (again.status, again.json()) == (200, {"model": "m"})
        finally:
            over.set()
        assert len(connections) == 2
        assert (connections[0] == connections[1]) == (name == "short json" and keeps)
        assert (router.in_flight(), router.up()) == (0, 1)
