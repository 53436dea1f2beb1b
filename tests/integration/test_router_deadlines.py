"""Each phase of a request at a worker ends in its time: connecting, the handshake, sending. Those of the answer, and
of the client, are in test_router_faults.py."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.support.plain_worker import Handler, working
from tests.support.routing import CHAT, StartRouter, start_router

__all__ = ["start_router"]
NEVER_S = 3600.0
"""A deadline that is not meant: no test waits so long."""


@contextmanager
def nobody_accepts(full: bool) -> Iterator[int]:
    """The port of a socket that listens, and no more. ``full``: nor does the kernel take one more connection."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0 if full else 100))
        for _ in range(4 if full else 0):
            waits = stack.enter_context(socket.socket())
            waits.setblocking(False)
            waits.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


@pytest.mark.parametrize(("scheme", "full"), [("http", True), ("https", False)], ids=["connection", "handshake"])
def test_no_connection_in_time(start_router: StartRouter, wait_for: Any, scheme: str, full: bool) -> None:
    """The workers are tried one after the other, and nothing was sent to any."""
    settings = {"first_byte_timeout_s": NEVER_S, "health_timeout_s": NEVER_S, "connect_timeout_s": 0.4}
    with nobody_accepts(full) as one, nobody_accepts(full) as two:
        urls = [f"m={scheme}://127.0.0.1:{port}" for port in (one, two)]
        router = start_router(*urls, wait_up=False, **settings)
        answer = router.chat("m")
        assert (answer.status, answer.json()["error"]["code"]) == (503, "no_healthy_worker")
        assert "no connection within the deadline" in answer.json()["error"]["message"]
        assert int(answer.header("retry-after") or 0) >= 1
        assert (router.in_flight(), router.up()) == (0, 0)


def test_a_request_that_its_worker_does_not_take(start_router: StartRouter, wait_for: Any) -> None:
    over = threading.Event()

    def serve(handler: Handler) -> None:
        over.wait(60)
        handler.close_connection = True

    with working(serve) as worker:
        router = start_router(worker.url, first_byte_timeout_s=0.5)
        try:
            body = json.dumps({"model": "m", "pad": "x" * (16 << 20), **CHAT}).encode()
            answer = router.request("POST", "/v1/chat/completions", body)
            assert (answer.status, answer.json()["error"]["code"]) == (504, "first_byte_timeout")
            wait_for(lambda: router.in_flight() == 0, what="the count to go back")
        finally:
            over.set()
