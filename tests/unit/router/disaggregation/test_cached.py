"""The tokens that were cached, in answers: replaced, put in where there is room, and nothing else touched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.disaggregation.cached import corrected, replaced
from router.relay.framing import Framing
from router.relay.upstream import Taker

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


class Client:
    """Takes what is handed on."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.body = b""
        self.ended = False

    def came(self, head: Any, piece: bytes, ended: bool) -> None:
        if head is not None:
            self.lines = list(head.lines)
        self.body += piece
        self.ended = self.ended or ended

    def malformed(self, reason: str) -> None:
        raise AssertionError(reason)

    def broke(self, reason: str, stale: bool) -> None:
        raise AssertionError(reason)


def through(raw: bytes, cuts: list[int], path: str = CHAT, cached: int = 5) -> Client:
    """An answer as it comes in pieces."""
    client, framing = Client(), Framing()
    taker: Taker = corrected(client, path, cached)
    framing.begin(True)
    told = False
    for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        piece = framing.feed(raw[start:stop])
        if framing.head is not None and start != stop:
            taker.came(None if told else framing.head, piece, framing.ended)
            told = True
    assert client.ended
    return client


def whole(document: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(document) + document


def stream(*pieces: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def plain(body: bytes) -> bytes:
    """Without its chunks."""
    out = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        out += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return out


@pytest.mark.parametrize(
    ("path", "document", "becomes"),
    [
        (
            CHAT, {"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 9, "a": 1}}},
            {"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5, "a": 1}}},
        ),
        (
            CHAT, {"usage": {"prompt_tokens": 9, "prompt_tokens_details": {}}},
            {"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5}}},
        ),
        (
            CHAT, {"id": "é", "usage": {"prompt_tokens": 9, "prompt_tokens_details": None}},
            {"id": "é", "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5}}},
        ),
        (
            CHAT, {"usage": {"prompt_tokens": 9}},
            {"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5}}},
        ),
        (
            RESPONSES, {"usage": {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 9}}},
            {"usage": {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 5}}},
        ),
        (
            RESPONSES, {"type": "response.completed", "response": {"usage": {"input_tokens_details": None}}},
            {"type": "response.completed", "response": {"usage": {"input_tokens_details": {"cached_tokens": 5}}}},
        ),
        (
            MESSAGES, {"usage": {"input_tokens": 1, "cache_read_input_tokens": 9}},
            {"usage": {"input_tokens": 5, "cache_read_input_tokens": 5}},
        ),
        (
            MESSAGES, {"type": "message_start", "message": {"usage": {"cache_read_input_tokens": 9}}},
            {"type": "message_start", "message": {"usage": {"cache_read_input_tokens": 5, "input_tokens": 4}}},
        ),
        (MESSAGES, {"usage": {"input_tokens": 9}}, {"usage": {"input_tokens": 9}}),
        (MESSAGES, {"usage": {"cache_read_input_tokens": "odd"}}, {"usage": {"cache_read_input_tokens": "odd"}}),
        (CHAT, {"usage": None}, {"usage": None}),
        (CHAT, {"usage": "odd"}, {"usage": "odd"}),
        (CHAT, {"choices": []}, {"choices": []}),
        (CHAT, [1], [1]),
    ],
)  # fmt: skip
def test_the_number_stands_where_the_answers_api_has_it(path: str, document: Any, becomes: Any) -> None:
    assert json.loads(replaced(json.dumps(document).encode(), path, 5)) == becomes
    client = through(whole(json.dumps(document).encode()), [], path)
    assert json.loads(client.body) == becomes
    assert b"content-length: %d" % len(client.body) in client.lines


def test_zero_is_a_number_too() -> None:
    found = replaced(b'{"usage":{"prompt_tokens_details":{"cached_tokens":64}}}', CHAT, 0)
    assert json.loads(found) == {"usage": {"prompt_tokens_details": {"cached_tokens": 0}}}


EVENTS = (
    b": a comment\n\n",
    b'data: {"choices":[{"delta":{"content":"say \\"usage\\":{}"}}],"usage":null}\n\n',
    b"event: odd\ndata: no json\n\n",
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":9}}}\n\n',
    b"data: [DONE]\n\n",
    b'data: {"usage":{"prompt_tokens_details":null}}',  # without a line's end
)
AFTER = (
    b"".join(EVENTS)
    .replace(b'"cached_tokens":9', b'"cached_tokens":5')
    .replace(b'"prompt_tokens_details":null', b'"prompt_tokens_details":{"cached_tokens":5}')
)


@given(st.lists(st.integers(1, len(stream(*EVENTS)) - 1), max_size=12), st.booleans())
def test_a_stream_cut_anywhere(cuts: list[int], joined: bool) -> None:
    raw = stream(b"".join(EVENTS)) if joined else stream(*EVENTS)
    cuts = sorted({cut for cut in cuts if cut < len(raw)})
    assert plain(through(raw, cuts).body) == AFTER


def test_what_is_no_success_goes_on_as_it_came() -> None:
    document = b'{"usage":{"prompt_tokens_details":{"cached_tokens":9}}}'
    raw = whole(document).replace(b"200 OK", b"400 Bad Request")
    assert through(raw, []).body == document
    raw = whole(document).replace(b"content-type", b"content-encoding: gzip\r\ncontent-type")
    assert through(raw, []).body == document


def test_what_is_very_long_goes_on_as_it_came() -> None:
    document = b'{"a":"%b","usage":{"prompt_tokens_details":{"cached_tokens":9}}}' % (b"x" * (2 << 20))
    assert through(whole(document), [1 << 20]).body == document
    line = b"data: " + document + b"\n\n"
    assert plain(through(stream(line, EVENTS[3]), []).body) == line + EVENTS[3].replace(
        b'"cached_tokens":9', b'"cached_tokens":5'
    )
