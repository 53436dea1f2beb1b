"""The mount's HTTP server: routes, bodies, errors and bounds, over real sockets."""

import json
import logging

import msgspec
import pytest
import trio

from helios.errors import Conflict
from heliosfs import http
from heliosfs.routing import Page, Route, Routes, json_page, page

pytestmark = pytest.mark.trio


class Body(msgspec.Struct, forbid_unknown_fields=True):
    number: int


@pytest.fixture
async def ask(nursery):
    """Sends bytes on a new connection; gives (status, headers, body) of each answer until the server closes."""

    async def echo(request):
        return json_page({"values": dict(request.values), "number": request.json(Body).number}, 201)

    async def slow(request):
        await trio.sleep_forever()

    async def fails(request):
        raise RuntimeError("unforeseen")

    async def conflict(request):
        raise Conflict("it is taken", hint="take another")

    routes = Routes(
        [
            Route("GET", "/hello", page(lambda: Page(b"hello\n"))),
            Route("PUT", "/things/{id}", echo),
            Route("DELETE", "/things/{id}", conflict),
            Route("GET", "/slow", slow),
            Route("GET", "/fails", fails),
        ]
    )
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(http.serve, listeners, routes)
    port = listeners[0].socket.getsockname()[1]

    async def send(*requests):
        with trio.fail_after(30):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                for request in requests:
                    await stream.send_all(request)
                return parse(b"".join([part async for part in stream]))

    return send


def parse(data):
    answers = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(headers["content-length"])
        answers.append((int(first.split()[1]), headers, data[:length]))
        data = data[length:]
    return answers


def request(method, path, body=b"", close=True):
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + (b"connection: close\r\n" if close else b"") + b"\r\n" + body


def error_of(answer):
    status, headers, body = answer
    assert headers["content-type"] == "application/json"
    return status, json.loads(body)["error"]


async def test_a_page(ask):
    ((status, headers, body),) = await ask(request("GET", "/hello?with=a%20query"))
    assert (status, body) == (200, b"hello\n")
    assert headers["content-type"].startswith("text/plain")


async def test_a_body_and_a_part_of_the_path(ask):
    ((status, _, body),) = await ask(request("PUT", "/things/a%2Fb", b'{"number": 7}'))
    assert status == 201
    assert json.loads(body) == {"values": {"id": "a/b"}, "number": 7}


async def test_a_chunked_body(ask):
    head = b"PUT /things/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    ((status, _, body),) = await ask(head, b'6\r\n{"numb\r\n', b'7\r\ner": 8}\r\n0\r\n\r\n')
    assert (status, json.loads(body)["number"]) == (201, 8)


async def test_several_requests_on_one_connection(ask, monkeypatch):
    monkeypatch.setattr(http, "TRANSFER_S", 0.5)
    put = request("PUT", "/things/x", b'{"number": 1}', close=False)
    answers = await ask(put, request("GET", "/hello", close=False), request("GET", "/nope", close=False), put[:-1])
    assert [status for status, _, _ in answers] == [201, 200, 404]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"number": "x"}', b'{"number": 1, "more": 2}', b"\xff", b"[" * 9000]
)
async def test_a_malformed_body_is_refused_with_the_reason(ask, body):
    (answer,) = await ask(request("PUT", "/things/x", body))
    status, error = error_of(answer)
    assert (status, error["code"]) == (400, "InvalidInput")
    assert "PUT /things/x" in error["message"]


@pytest.mark.parametrize("length", [http.MAX_BODY + 1, 5 << 20])
async def test_a_body_too_long_is_refused_and_not_kept(ask, length):
    (answer,) = await ask(request("PUT", "/things/x", b" " * length))
    assert error_of(answer)[0] == 413


async def test_a_body_of_the_longest_length_is_taken(ask):
    ((status, _, _),) = await ask(request("PUT", "/things/x", b'{"number": 1}'.ljust(http.MAX_BODY)))
    assert status == 201


async def test_unknown_paths_and_methods(ask):
    for path in ("/", "/nope", "/things", "/things/", "/things/a/b", "//hello", "/hello/"):
        (answer,) = await ask(request("GET", path))
        status, error = error_of(answer)
        assert (status, error["code"]) == (404, "NotFound"), path
        assert "/things/{id}" in error["message"]
    (answer,) = await ask(request("POST", "/things/x"))
    assert answer[1]["allow"] == "delete, put"
    assert error_of(answer)[0] == 405


async def test_head_is_get_without_the_body(ask):
    ((status, headers, body),) = await ask(request("HEAD", "/hello"))
    assert (status, headers["content-length"], body) == (200, "6", b"")


async def test_errors_say_what_was_wrong(ask):
    (answer,) = await ask(request("DELETE", "/things/x"))
    assert error_of(answer) == (409, {"code": "Conflict", "message": "it is taken", "hint": "take another"})


async def test_a_bug_is_a_500_and_in_the_log(ask, caplog, expected_log_errors):
    expected_log_errors("a request failed")
    with caplog.at_level(logging.ERROR):
        (answer,) = await ask(request("GET", "/fails"))
    assert error_of(answer)[0] == 500
    assert "unforeseen" in caplog.text
    assert b"unforeseen" not in answer[2]


async def test_an_answer_that_does_not_come_is_a_504(ask, monkeypatch):
    monkeypatch.setattr(http, "ANSWER_S", 0.1)
    (answer,) = await ask(request("GET", "/slow"))
    assert error_of(answer)[0] == 504


async def test_a_request_that_does_not_come_is_not_waited_for(ask, monkeypatch):
    monkeypatch.setattr(http, "TRANSFER_S", 0.1)
    assert await ask(b"PUT /things/x HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{") == []
    assert await ask(b"GE") == []


async def test_what_is_not_http_is_dropped(ask):
    assert await ask(b"\x16\x03\x01 not http\r\n\r\n") == []
    assert (await ask(request("GET", "/hello")))[0][0] == 200
