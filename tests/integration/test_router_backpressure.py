"""Nobody is read faster than the other side takes it: what a slow client or a slow worker leaves stays where it is."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.support.plain_worker import Handler, working
from tests.support.routing import RouterProcess, StartRouter, start_router

__all__ = ["start_router"]
MIB = 1 << 20
PIECE = bytes(range(256)) * 1024
ANSWER = 200 * MIB
UPLOAD = 160 * MIB
SLACK = 40 * MIB
"""What sockets' buffers in the kernel may hold, and what a process's memory may grow for other reasons."""
BOUNDARY = b"b0undary"


def settled(value: Callable[[], float], seconds: float = 0.7) -> float:
    """What it is when it has not changed for so long."""
    end, last, since = time.monotonic() + 60, value(), time.monotonic()
    while time.monotonic() - since < seconds:
        assert time.monotonic() < end, "it goes on and on"
        time.sleep(0.05)
        if (now := value()) != last:
            last, since = now, time.monotonic()
    return last


def memory(router: RouterProcess) -> int:
    return int(router.metric("helios_rss_anon_shmem_bytes"))


def test_a_worker_is_not_read_faster_than_its_client_reads(start_router: StartRouter) -> None:
    def serve(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["content-length"]))
        handler.send_response(200)
        handler.send_header("content-length", str(ANSWER))
        handler.end_headers()
        while handler.server.moved < ANSWER:
            handler.wfile.write(PIECE)
            handler.server.moved += len(PIECE)

    with working(serve) as worker:
        router = start_router(worker.url)
        before = memory(router)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(router.address)
            body = json.dumps({"model": "m", "prompt": "x"}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            taken = settled(lambda: worker.moved)
            assert 0 < taken < SLACK
            assert memory(router) - before < SLACK
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
            answer = http.client.HTTPResponse(sock, method="POST")  # from here on it is taken, and all of it comes
            answer.begin()
            got = 0
            while piece := answer.read(MIB):
                assert piece[:256] == PIECE[:256]
                got += len(piece)
            assert got == ANSWER
    assert router.in_flight() == 0


def test_an_upload_is_not_read_faster_than_its_worker_reads(start_router: StartRouter, wait_for: Any) -> None:
    reads = threading.Event()
    part = b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n'
    first = part % (BOUNDARY, b"model", b"") + b"m\r\n" + part % (BOUNDARY, b"file", b'; filename="a.wav"')
    last = b"\r\n--%b--\r\n" % BOUNDARY
    size = len(first) + UPLOAD + len(last)

    def serve(handler: Handler) -> None:
        assert reads.wait(60)
        whole = hashlib.sha256()
        while handler.server.moved < size:
            data = handler.rfile.read(min(MIB, size - handler.server.moved))
            whole.update(data)
            handler.server.moved += len(data)
        handler.say(json.dumps({"text": whole.hexdigest()}).encode())

    with working(serve) as worker:
        router = start_router(worker.url, max_body_mib=256, max_buffered_mib=16)
        before = memory(router)
        sent = hashlib.sha256()
        with socket.create_connection(router.address, timeout=60) as sock:
            kind = b"Content-Type: multipart/form-data; boundary=%b\r\n" % BOUNDARY
            head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: h\r\n" + kind
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % size)
            for data in (first, *[PIECE] * (UPLOAD // len(PIECE)), last):
                sock.sendall(data)
                sent.update(data)
            wait_for(lambda: router.in_flight() == 1, timeout_s=30, what="the request at its worker")
            assert settled(lambda: memory(router)) - before < SLACK
            reads.set()
            answer = http.client.HTTPResponse(sock, method="POST")
            answer.begin()
            assert (answer.status, json.loads(answer.read())) == (200, {"text": sent.hexdigest()})
    assert router.in_flight() == 0
