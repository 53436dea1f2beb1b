"""Ending an answer: a whole error before its head, an event between two events, a cut in every other place."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from router import errors
from router.errors import ApiError
from router.relay.answer import Answer
from router.relay.protocol import Cut

EVENTS = [(b"Content-Type", b"text/event-stream; charset=utf-8")]


class Connection:
    """Stands for the client's connection: what was sent, and how it ended."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.ended = ""

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages)


def answer(connection: Connection) -> Answer:
    return Answer(connection.send, cast(Cut, connection), errors.OPENAI, "id")


def relay(headers: list[tuple[bytes, bytes]], *pieces: bytes) -> Connection:
    async def main() -> Connection:
        connection = Connection()
        one = answer(connection)
        await one.start(200, headers)
        for piece in pieces:
            await one.body(piece)
        await one.fail(errors.worker_lost("why"))
        return connection

    return asyncio.run(main())


def test_before_the_head_it_is_a_whole_answer() -> None:
    connection = Connection()
    asyncio.run(answer(connection).fail(errors.no_worker("m", "why", 3)))
    head, body = connection.messages
    assert head["status"] == 503
    assert (b"retry-after", b"3") in head["headers"]
    assert (b"content-length", str(len(body["body"])).encode()) in head["headers"]
    assert (body["more_body"], connection.ended) == (False, "")


@pytest.mark.parametrize(
    "pieces",
    [[], [b"data: 1\n\n"], [b"data: 1\r\n\r\n"], [b"data: 1\n", b"\n"], [b"data: 1", b"\r\n\r", b"\n"], [b"\n\n"]],
)
def test_between_events_the_client_is_told(pieces: list[bytes]) -> None:
    connection = relay(EVENTS, *pieces)
    assert connection.body.removeprefix(b"".join(pieces)).startswith(b'data: {"error":')
    assert connection.body.endswith(b"\n\n")
    assert connection.ended == "closed"
    assert all(m.get("more_body", True) for m in connection.messages)


@pytest.mark.parametrize(
    "pieces", [[b"data: 1"], [b"data: 1\n"], [b"data: 1\n\n", b"data:"], [b"x" * 100], [b"\r\n\r"]]
)
def test_inside_an_event_the_stream_is_only_cut(pieces: list[bytes]) -> None:
    connection = relay(EVENTS, *pieces)
    assert (connection.body, connection.ended) == (b"".join(pieces), "closed")


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-type", b"application/json")],
        [],
        [*EVENTS, (b"content-encoding", b"gzip")],
        [*EVENTS, (b"content-length", b"100")],
    ],
)
def test_what_is_no_plain_event_stream_is_only_cut(headers: list[tuple[bytes, bytes]]) -> None:
    connection = relay(headers, b"data: 1\n\n")
    assert (connection.body, connection.ended) == (b"data: 1\n\n", "closed")


def test_a_client_that_takes_nothing_is_aborted() -> None:
    async def main() -> None:
        connection = Connection()
        blocked = asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await blocked.wait()

        one = Answer(send, cast(Cut, connection), errors.OPENAI, "id")
        await one.start(200, EVENTS)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await one.body(b"data: 1\n\n")
        await one.fail(errors.shutting_down())
        assert connection.ended == "aborted"

    asyncio.run(main())


@pytest.mark.parametrize(
    "raw", [[(b"bad name", b"x")], [(b"", b"x")], [(b"x", b"a\x01")], [(b"x", b"a\r\nset-cookie: y")]]
)
def test_headers_that_cannot_be_passed_on_are_the_workers_fault(raw: list[tuple[bytes, bytes]]) -> None:
    connection = Connection()
    with pytest.raises(ApiError) as refused:
        asyncio.run(answer(connection).start(200, raw))
    assert refused.value.status == 502
    assert connection.messages == []
