"""HTTP as clients, proxies and attackers send it: fragments, pipelines, old versions, and what two parsers might read
in two ways."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import CHAT, RouterProcess, StartRouter, converse, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
BODY = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n" % (len(BODY), BODY)


@pytest.fixture
def fake(fake_vllm: Callable[..., Control]) -> Control:
    return fake_vllm("tiny", created=1)


@pytest.fixture
def router(fake: Control, start_router: StartRouter) -> RouterProcess:
    return start_router(fake)


@pytest.fixture
def sock(router: RouterProcess) -> Iterator[socket.socket]:
    with socket.create_connection(router.address, timeout=20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield sock


def answer(sock: socket.socket) -> tuple[int, bytes]:
    """The next answer on a connection on which no other is under way."""
    response = http.client.HTTPResponse(sock, method="POST")
    response.begin()
    return response.status, response.read()


def answers(sock: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """So many answers with a length, one after the other."""
    found = []
    with sock.makefile("rb") as file:
        for _ in range(count):
            status = int(file.readline().split()[1])
            length = 0
            while line := file.readline().strip():
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            found.append((status, file.read(length)))
    return found


@pytest.mark.parametrize("request_", [REQUEST, CHUNKED], ids=["length", "chunked"])
def test_a_request_in_two_pieces_cut_anywhere(router: RouterProcess, sock: socket.socket, request_: bytes) -> None:
    found = set()
    for cut in range(1, len(request_)):
        sock.sendall(request_[:cut])
        time.sleep(0.001)  # so that it is read by itself
        sock.sendall(request_[cut:])
        status, body = answer(sock)
        found.add((status, len(body) > 100))
    assert found == {(200, True)}


def test_head_has_the_head_alone(fake: Control, router: RouterProcess) -> None:
    """And what follows on the connection is not taken for its body."""
    with socket.create_connection(router.address, timeout=20) as sock:
        for path, status in ((b"/healthz", 200), (b"/v1/models", 200), (b"/v1/completions", 405), (b"/sleep", 404)):
            sock.sendall(b"HEAD %b HTTP/1.1\r\nHost: h\r\n\r\n" % path)
            response = http.client.HTTPResponse(sock, method="HEAD")
            response.begin()
            assert (response.status, response.read()) == (status, b"")
            assert int(response.getheader("content-length") or 0) > 10
            sock.sendall(REQUEST)
            assert answer(sock)[0] == 200
    assert {record["method"] for record in fake.journal()} == {"POST"}


def test_one_byte_at_a_time(router: RouterProcess, sock: socket.socket) -> None:
    for number in range(len(CHUNKED)):
        sock.sendall(CHUNKED[number : number + 1])
    assert answer(sock)[0] == 200


def test_a_pipeline_is_answered_in_order_whoever_answers(fake: Control, router: RouterProcess) -> None:
    models = b"GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n"
    wrong = REQUEST.replace(b"/v1/completions", b"/v1/nonsense")
    unknown = HEAD + b"Content-Length: 13\r\n\r\n" + b'{"model":"x"}'
    with socket.create_connection(router.address, timeout=20) as sock:
        sock.sendall(REQUEST + models + CHUNKED + wrong + unknown + models + REQUEST)
        got = answers(sock, 7)
    assert [status for status, _ in got] == [200, 200, 200, 404, 404, 200, 200]
    assert json.loads(got[1][1])["data"][0]["id"] == "tiny"
    assert json.loads(got[4][1])["error"]["code"] == "model_not_found"
    assert len(fake.journal()) == 3


def test_a_client_that_leaves_with_requests_in_its_pipeline_leaves_nothing(
    fake: Control, router: RouterProcess, wait_for: Callable[..., None]
) -> None:
    fake.fault("stall", times=None)
    with socket.create_connection(router.address, timeout=20) as sock:
        sock.sendall(REQUEST * 5)
        wait_for(lambda: router.in_flight() == 1, what="the first to be at the worker")
    wait_for(lambda: router.in_flight() == 0, what="the router to notice")
    fake.clear_faults()
    assert router.chat().status == 200
    wait_for(lambda: len(fake.journal()) == 2, what="two requests in all")


def test_http_1_0_gets_no_chunks_and_the_end_of_the_connection(router: RouterProcess) -> None:
    old = REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0")
    whole = converse(router.address, old)
    assert whole.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in whole
    body = json.dumps({"model": "tiny", **CHAT, "max_tokens": 4, "stream": True}).encode()
    head = old.partition(b"Content-Length")[0].replace(b"/v1/completions", b"/v1/chat/completions")
    stream = converse(router.address, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    headers, _, events = stream.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in headers.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


def test_a_client_that_wants_to_close_is_closed(router: RouterProcess) -> None:
    got = converse(router.address, REQUEST.replace(b"Host: h", b"Host: h\r\nConnection: close"))
    assert b"\r\nconnection: close\r\n" in got


def test_an_early_refusal_is_read_by_a_client_that_goes_on_sending(fake: Control, start_router: StartRouter) -> None:
    router = start_router(fake, max_body_mib=1)
    with socket.create_connection(router.address, timeout=20) as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (3 << 20))
        for _ in range(48):
            sock.sendall(b"x" * 65536)
        status, body = answer(sock)
        assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
        assert sock.recv(1) == b""
    assert fake.journal() == []


def test_a_websocket_is_not_opened(fake: Control, router: RouterProcess, sock: socket.socket) -> None:
    offer = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n"
    sock.sendall(REQUEST.replace(b"Host: h\r\n", b"Host: h\r\n" + offer))
    assert answer(sock)[0] == 200
    sock.sendall(b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\n" + offer + b"\r\n")
    assert answer(sock)[0] == 404


BOTH = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % len(BODY)
SMUGGLED = b"POST /sleep HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
"""What the next request on the worker's connection would be."""
VECTORS = {
    "a length and chunks": HEAD + BOTH + b"\r\n0\r\n\r\n" + SMUGGLED,
    "chunks and a length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": HEAD + b"Content-Length: 4\r\nContent-Length: 100\r\n\r\nabcd" + SMUGGLED,
    "the same length twice": HEAD + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd" + SMUGGLED,
    "a list of lengths": HEAD + b"Content-Length: 4, 4\r\n\r\nabcd" + SMUGGLED,
    "a signed length": HEAD + b"Content-Length: +4\r\n\r\nabcd" + SMUGGLED,
    "a negative length": HEAD + b"Content-Length: -4\r\n\r\nabcd" + SMUGGLED,
    "a hexadecimal length": HEAD + b"Content-Length: 0x4\r\n\r\nabcd" + SMUGGLED,
    "a length of nothing": HEAD + b"Content-Length: \r\n\r\nabcd" + SMUGGLED,
    "a length that overflows": HEAD + b"Content-Length: 18446744073709551620\r\n\r\nabcd" + SMUGGLED,
    "a space before the colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked that is not last": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "another coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a folded line": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a bare line feed": HEAD + b"X-A: 1\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a bare carriage return": HEAD + b"X-A: 1\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a zero byte in a name": HEAD + b"X\x00A: 1\r\nContent-Length: 2\r\n\r\n{}",
    "a chunk longer than it says": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk size with a sign": HEAD + b"Transfer-Encoding: chunked\r\n\r\n+2\r\nab\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk size that overflows": HEAD + b"Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\nab\r\n",
    "a chunk ended by a line feed": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\n0\r\n\r\n" + SMUGGLED,
    "no version": b"POST /v1/completions\r\nHost: h\r\n\r\n",
    "version 2": HEAD.replace(b"HTTP/1.1", b"HTTP/2.0") + b"Content-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", VECTORS)
def test_what_two_parsers_might_read_in_two_ways_is_refused(fake: Control, router: RouterProcess, name: str) -> None:
    with socket.create_connection(router.address, timeout=10) as sock:
        sock.sendall(VECTORS[name])
        status, body = answer(sock)
        assert status == 400
        assert json.loads(body)["error"]["code"] in ("invalid_http", "invalid_json")
        assert sock.recv(1) == b""
    assert fake.journal() == []
    assert router.chat().status == 200


def test_garbage_behind_a_request_does_not_harm_its_answer(fake: Control, router: RouterProcess) -> None:
    for garbage in (b"NONSENSE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
        got = converse(router.address, REQUEST + garbage)
        head, _, body = got.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert got.count(b"HTTP/1.1 ") == 1
        assert json.loads(body)["object"] == "text_completion"
    assert len(fake.journal()) == 2


def test_a_body_that_turns_into_garbage(fake: Control, router: RouterProcess) -> None:
    got = converse(router.address, HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\nZZ\r\n')
    assert got.startswith(b"HTTP/1.1 400")
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert fake.journal() == []


@pytest.mark.parametrize("head", [b"X-A: " + b"a" * 300_000, b"X-A: 1\r\n" * 40_000], ids=["long", "many"])
def test_heads_are_bounded(fake: Control, router: RouterProcess, head: bytes) -> None:
    with socket.create_connection(router.address, timeout=20) as sock:
        sock.sendall(HEAD)
        try:
            sock.sendall(head)
            got = sock.recv(65536)
        except OSError:  # it was closed with bytes of ours unread
            got = b"HTTP/1.1 431"
    assert got.startswith(b"HTTP/1.1 431")
    assert router.chat().status == 200


def test_a_trailer_is_no_header(fake: Control, router: RouterProcess, sock: socket.socket) -> None:
    sock.sendall(CHUNKED.replace(b"x-trailer: 1", b"authorization: Bearer stolen"))
    assert answer(sock)[0] == 200
    assert "authorization" not in dict(fake.journal()[-1]["headers"])
