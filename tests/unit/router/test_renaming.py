"""The model's name in answers: replaced where it is the answer's own, however the answer comes; else not a byte."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.relay import renaming
from router.relay.ending import chunked
from router.relay.framing import LAST_CHUNK, Framing, Head, Mode, Payload
from router.relay.renaming import Document, Events, renamed

NAME = "the-\xe4lias/of mine"
JSON_NAME = json.dumps(NAME, ensure_ascii=False).encode()


class Client:
    """Takes what the exchange would."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.raw, self.ended, self.told = b"", False, ""

    def came(self, head: Head | None, piece: bytes, ended: bool) -> None:
        assert not self.ended
        assert (head is None) is (self.head is not None)
        self.head = head or self.head
        self.raw, self.ended = self.raw + piece, ended

    def malformed(self, reason: str) -> None:
        self.told = reason

    def broke(self, reason: str, stale: bool) -> None:
        self.told = reason

    @property
    def body(self) -> bytes:
        assert self.head is not None
        if not chunked(self.head):
            return self.raw
        assert self.raw.endswith(LAST_CHUNK) is self.ended
        return Payload().of(self.raw)

    def header(self, name: bytes) -> list[bytes]:
        assert self.head is not None
        lines = self.head.encode(b"id", True).split(b"\r\n")
        return [line.partition(b": ")[2] for line in lines if line.lower().startswith(name + b":")]


def passed(answer: bytes, cuts: list[int], *, http11: bool = True, closes: bool = False) -> Client:
    """What a client gets of an answer that comes in these pieces; ``closes``: the connection ends then."""
    client, framing, told = Client(), Framing(), False
    taker = renamed(client, NAME)
    framing.begin(http11)
    at = [0, *cuts, len(answer)]
    for begin, end in pairwise(at):
        if begin == end:
            continue
        piece = framing.feed(answer[begin:end])
        if told:
            taker.came(None, piece, framing.ended)
        elif framing.head is not None:
            told = True
            taker.came(framing.head, piece, framing.ended)
    if closes:
        taker.came(None, framing.end_of_input(), True)
    return client


def chunks(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + LAST_CHUNK


def event(document: Any, kind: str = "") -> bytes:
    text = json.dumps(document, separators=(",", ":")) if not isinstance(document, str) else document
    return (f"event: {kind}\n" if kind else "").encode() + f"data: {text}\n\n".encode()


def whole(body: bytes, kind: bytes = b"application/json", more: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\ncontent-type: %b\r\n%b\r\n" % (status, len(body), kind, more) + body


def own(data: bytes) -> bytes:
    """With what a worker writes where ``@`` stands, which is the place of the answer's own name."""
    return data.replace(b'"@"', b'"served"')


def with_name(data: bytes) -> bytes:
    return data.replace(b'"@"', JSON_NAME)


CHUNK = {"id": "c", "object": "chat.completion.chunk", "model": "@", "choices": [{"delta": {"content": "m"}}]}
HIDDEN = {"choices": [{"message": {"model": "served"}, "text": '{"model":"served"}'}], "meta": {"model": "served"}}
RESPONSE = {"response": {"id": "r", "metadata": {"model": "served"}, "model": "@"}, "type": "response.created"}
MESSAGE = {"type": "message_start", "message": {"id": "a", "content": [], "model": "@", "stop": None}}
OF_EVENTS = [
    event(CHUNK), event(CHUNK), b": keep-alive\n\n", event({**CHUNK, "model": "@", "id": "d"}),
    event(RESPONSE, "response.created"), event(HIDDEN), event(MESSAGE, "message_start"), event("[DONE]"),
    event(RESPONSE).replace(b"\n", b"\r\n"), b'data:{"model": "@"}\n\n', b'dat: {"model":"served"}\n\n',
    b'data: {"model":5}\n\n', b"data\n", b"\n", b'data: {"a":"\\"model\\":","model" : "@"}\n',
]  # fmt: skip
"""As lines that are whole."""
TAILS = [b"", b'data: {"model":"ser', b"da", b'data: {"model":"@","a']
STREAM = b"".join(OF_EVENTS[:8])
RENAMED = with_name(STREAM)
STREAM = own(STREAM)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
CHUNKED = STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks(STREAM, 100)


def test_a_stream_cut_anywhere() -> None:
    assert RENAMED.count(JSON_NAME) == 5
    for cut in range(1, len(CHUNKED)):
        client = passed(CHUNKED, [cut])
        assert client.body == RENAMED
        assert client.ended
    assert passed(CHUNKED, list(range(1, len(CHUNKED)))).body == RENAMED
    assert client.header(b"transfer-encoding") == [b"chunked"]


def test_a_stream_for_an_old_client_and_one_that_ends_with_its_connection() -> None:
    old = passed(CHUNKED, [200, 300], http11=False)
    assert (old.raw, old.ended, old.header(b"transfer-encoding")) == (RENAMED, True, [])
    for http11 in (True, False):
        closed = passed(STREAM_HEAD + b"\r\n" + STREAM, [90, 200, 333], http11=http11, closes=True)
        assert closed.ended
        assert closed.body == RENAMED


@given(
    st.lists(st.sampled_from(OF_EVENTS), max_size=8), st.sampled_from(TAILS), st.lists(st.integers(0, 700), max_size=12)
)
@example([event(CHUNK), event(CHUNK)], b"", [150])
def test_fragments_of_a_stream_make_no_difference(events: list[bytes], tail: bytes, cuts: list[int]) -> None:
    told = b"".join([*events, tail])
    stream = own(told)
    at = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    text = Events(JSON_NAME)
    got = b"".join(text.feed(stream[begin:end]) for begin, end in pairwise(at)) + text.end()
    assert got == with_name(told)


@given(st.integers(-60, 20), st.integers(1, 40), st.booleans())
def test_how_far_is_looked_does_not_depend_on_fragments(beyond: int, size: int, streamed: bool) -> None:
    """The name near the end of what is looked at."""
    patched = 300
    before = renaming.MOST
    renaming.MOST = patched  # type: ignore[misc]
    try:
        lead = b"data: " if streamed else b""
        text = lead + b'{"a":"%b","model":"served","b":1}' % (b"x" * (patched + beyond - len(lead))) + b"\n" * streamed

        def made(step: int) -> bytes:
            one = Events(JSON_NAME) if streamed else Document(JSON_NAME)
            return b"".join(one.feed(text[at : at + step]) for at in range(0, len(text), step)) + one.end()

        assert made(size) == made(len(text))
        found = text.index(b"served") + len(b"served") + 1 <= patched
        assert made(size) == (text.replace(b'"served"', JSON_NAME) if found else text)
    finally:
        renaming.MOST = before  # type: ignore[misc]


@pytest.mark.parametrize(
    "told",
    [
        b'{"id":"x","model":"@","choices":[{"message":{"content":"\\"model\\":\\"served\\""}}]}',
        b'{"content":[{"model":"no","text":"a"}],"model" :\n "@","usage":{"model":"served"}}',
        json.dumps({"usage": {}, "text": "\u20ac" * 50_000, "model": "served"}).encode(),  # too far behind
        b'{"message":{"model":"served"}}',
        b'[{"model":"served"}]',
        b'{"object":"list","data":[1,2]}',
        b'{"model":null}',
        b'{"model":"' + b"x" * 5000 + b'"}',
        b"no JSON",
        b"",
    ],
)
def test_a_whole_answer(told: bytes) -> None:
    answer = whole(own(told))
    for cuts in ([], [1], [len(answer) - 1], list(range(70, 120)), [100, 101, 130]):
        client = passed(answer, [cut for cut in cuts if cut < len(answer)])
        assert client.ended
        assert client.raw == with_name(told)
        assert client.header(b"content-length") == [b"%d" % len(client.raw)]


def test_a_whole_answer_in_chunks() -> None:
    body = b'{"model":"served","choices":[]}'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    for cut in range(1, 100):
        client = passed(head + b"transfer-encoding: chunked\r\n\r\n" + chunks(body, 7), [cut])
        assert client.ended
        assert client.body == body.replace(b'"served"', JSON_NAME)
    old = passed(head + b"transfer-encoding: chunked\r\n\r\n" + chunks(body, 7), [], http11=False)
    assert old.raw == body.replace(b'"served"', JSON_NAME)
    closed = passed(head + b"\r\n" + body, [60], closes=True)
    assert closed.head is not None
    assert closed.head.mode is Mode.CHUNKED
    assert closed.body == body.replace(b'"served"', JSON_NAME)


BODY = b'{"model":"served"}'


@pytest.mark.parametrize(
    "answer",
    [
        whole(BODY, status=b"404 Not Found"),
        whole(BODY, b"text/plain"),
        whole(BODY, more=b"Content-Encoding: gzip\r\n"),
        whole(BODY, more=b"Repr-Digest: sha-256=:AAAA:\r\n"),
        whole(own(event(CHUNK)), b"text/event-stream"),
        STREAM_HEAD + b"content-encoding: br\r\ntransfer-encoding: chunked\r\n\r\n" + chunks(own(event(CHUNK)), 30),
        STREAM_HEAD.replace(b"200 OK", b"500 No")
        + b"transfer-encoding: chunked\r\n\r\n"
        + chunks(own(event(CHUNK)), 30),
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ],
)
def test_other_answers_go_on_as_they_are(answer: bytes) -> None:
    body = answer.partition(b"\r\n\r\n")[2]
    client = passed(answer, list(range(1, len(answer), 3)))
    assert client.raw == body
    assert client.ended


def test_a_break_is_passed_on_and_what_was_held_back_is_not() -> None:
    client = Client()
    taker, framing = renamed(client, NAME), Framing()
    framing.begin(True)
    two = own(event(CHUNK) * 2)
    piece = framing.feed(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(two) + two[:-90])
    taker.came(framing.head, piece, framing.ended)
    taker.broke("it is gone", stale=False)
    assert client.told == "it is gone"
    assert client.body == with_name(event(CHUNK))
