"""Heads that come again, and that nothing but their speed differs from those that the parser takes."""

import asyncio
import re
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.relay import framing, protocol
from router.relay import recurring as module
from router.relay.alike import Alike
from router.relay.framing import BadAnswer, Framing
from router.relay.recurring import recurring
from router.routes import ROUTES
from tests.support.asked import Asked, served

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\ncontent-length:  12 \r\nX-Request-Id: a\r\nX: a.b\r\nE:\r\n\r\n"
FIXED = frozenset({b"x"})


def test_what_may_differ_is_free_and_all_else_is_not() -> None:
    like = recurring(HEAD, FIXED)
    assert like is not None
    assert (like.length, like.lines) == (3, 5)
    match = like.pattern.match(HEAD.replace(b"12", b"345").replace(b"Id: a", b"Id: an other") + b"body")
    assert match is not None
    assert (match.groups(), match.end()) == ((b"", b"h", b"345 ", b"an other", b"a.b", b""), len(HEAD) + 1 + 7)
    assert like.size(match) == 345
    for other in (
        HEAD.replace(b"a.b", b"aXb"), HEAD.replace(b"Host", b"host"), HEAD.replace(b"12 ", b"12"),
        HEAD.replace(b"12", b"1x"), HEAD.replace(b"12", b"-1"), HEAD.replace(b"12", b"+1"), HEAD.replace(b"12", b""),
        HEAD.replace(b"12", b"1" * 16), HEAD.replace(b"Id: a", b"Id: "), HEAD.replace(b"Id: a", b"Id: a\r\nB: c"),
        HEAD.replace(b"Id: a", b"Id: a\n"), HEAD.replace(b"1.1", b"1.0"),
        HEAD.replace(b"Id: a", b"Id:  a"), HEAD.replace(b"Id: a", b"Id: a\x7f"), HEAD.replace(b"Id: a", b"Id: \xe9"),
        HEAD.replace(b"Id: a", b"Id: " + b"a" * 4097), HEAD.replace(b"E:", b"E:1"), HEAD.replace(b"ions ", b"ions?a "),
        HEAD[:-1], b"\r\n" + HEAD, b"X" + HEAD,
    ):  # fmt: skip
        assert like.pattern.match(other) is None, other


def test_a_query_is_free_where_there_was_one() -> None:
    head = HEAD.replace(b"ions ", b"ions?key=a?b ")
    like = recurring(head, FIXED, b"key=a?b")
    assert like is not None
    for query in (b"", b"k", b"another?one"):
        match = like.pattern.match(head.replace(b"key=a?b", query))
        assert match is not None
        assert match[1] == query
    for target in (b"ions", b"ion?a", b"ions?a b", b"ions?a#b", b"ions?\x01"):
        assert like.pattern.match(head.replace(b"ions?key=a?b", target)) is None


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"content-length", b"content-lengths"),
        HEAD.replace(b"X: a.b", b"Content-Length: 12"),
        HEAD.replace(b"12", b"1_2"),
        HEAD.replace(b"X: a.b", b"X: a\r\n folded"),
        HEAD.replace(b"X: a.b", b"X : a"),
        HEAD.replace(b"X: a.b", b"X: a\nContent-Length: 1"),
        HEAD.replace(b"POST", b"PO\nST"),
        HEAD.replace(b"E:", b"E: \xe9"),
        HEAD.replace(b"E:", b"E: " + b"a" * 4096),
        HEAD.replace(b"a.b", b"a" * 1024),
        HEAD.replace(b"X: ", b"X: " + b" " * 1024),
        HEAD.replace(b"E:", b"E" * 1024 + b":"),
        HEAD.replace(b"E:", b"\r\n".join([b"E:"] * 64)),
        HEAD[:-2],
    ],
)
def test_a_head_that_leaves_doubts_or_is_large_is_never_one(head: bytes) -> None:
    assert recurring(head, FIXED) is None


def test_no_more_than_so_many_patterns_are_kept() -> None:
    for number in range(2 * module.MOST):
        assert recurring(HEAD.replace(b"E:", b"E%d:" % number), FIXED) is not None
        assert len(module._known) <= module.MOST


BEGIN = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\n"


@pytest.mark.parametrize(
    "lines",
    [
        b"".join(b"a%d:\r\n" % number for number in range(63)),
        b"".join(b"abcdefghi-%02d: b\r\n" % number for number in range(59)),
        b"x" * 950 + b": y\r\n",
        b"x: " + b"y" * 4000 + b"\r\n",
        b"x-request-id: " + b"%x" % (1 << 160) + b"\r\n" + b"x-request-id: a\r\n" * 55,
        b"connection: " + b"k" * 900 + b"\r\n",
    ],
)
def test_what_a_connection_keeps_of_a_head_has_a_bound(lines: bytes) -> None:
    """At the bounds of what is learned, in bytes, lines and literal bytes."""
    assert recurring(BEGIN + lines + b"\r\n", protocol.FIXED) is not None  # what is made once for all is there
    module._known.clear()
    re.purge()
    headers = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines.split(b"\r\n")[:-1])]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        like = recurring(BEGIN + lines + b"\r\n", protocol.FIXED)
        assert like is not None
        kept = Alike(like, ROUTES[0], headers)
        module._known.clear()
        re.purge()
        size = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept.like is like
    assert size < 32 << 10


# --- answers ---------------------------------------------------------------------------------------------------------

DATE = b"Sun, 29 Nov 2026 10:00:0%d GMT"
PLAIN = b"HTTP/1.1 200 OK\r\nDate: " + DATE + b"\r\nServer: s\r\ncontent-length: %d\r\nX: y\r\n\r\n%b"
ANSWERS = st.one_of(
    st.builds(lambda second, body: PLAIN % (second, len(body), body), st.integers(0, 9), st.binary(max_size=9)),
    st.builds(
        lambda second, body: PLAIN.replace(b"200", b"404") % (second, len(body), body), st.just(1), st.just(b"n")
    ),
    st.just(PLAIN % (1, 5, b"four")),
    st.just(PLAIN % (1, 3, b"four")),
    st.just(PLAIN % (1, 0, b"")),
    st.just(PLAIN.replace(b"Server: s", b"Connection: close") % (1, 1, b"c")),
    st.just(PLAIN.replace(b"Server: s", b"Connection: keep-alive") % (1, 1, b"k")),
    st.just(PLAIN.replace(b"Server: s", b"Connection: X") % (1, 1, b"x")),
    *(
        st.just(PLAIN.replace(b"Server: s", line) % (1, 1, b"t"))
        for line in (
            b"Server: t u ",
            b"Set-Cookie: a ",
            b"Content-Type: text/event-stream",
            b"Content-Type: b",
            b"Content-Encoding: gzip",
            b"Proxy-Connection: close",
            b"Keep-Alive: 5",
            b"Trailer: x",
        )
    ),
    st.just(PLAIN.replace(b"200 OK", b"204 No Content") % (1, 0, b"")),
    st.just(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
    st.just(b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN % (2, 1, b"h")),
    st.just(b"junk"),
)


def heard(answers: Sequence[bytes], cuts: Sequence[int]) -> list[object]:
    """What a framing makes of answers, each cut in two."""
    framed, seen = Framing(), list[object]()
    for answer, cut in zip(answers, cuts, strict=True):
        framed.begin(True)
        at = cut % (len(answer) + 1)
        try:
            body = b"".join(framed.feed(piece) for piece in (answer[:at], answer[at:]) if piece)
        except BadAnswer:
            seen.append("bad")
            break
        head = framed.head
        told = head and (head.status, head.keep_alive, head.length, head.events, head.identified)
        seen.append((told, body, framed.ended, head and head.encode(b"id", True)))
        if not (framed.ended and head and head.keep_alive):
            break
    return seen


@given(st.lists(st.tuples(ANSWERS, st.integers(0, 200)), max_size=6))
def test_answers_are_the_same_past_the_parser(given: list[tuple[bytes, int]]) -> None:
    answers, cuts = [answer for answer, _ in given], [cut for _, cut in given]
    fast = heard(answers, cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "recurring", lambda *_: None)
        assert fast == heard(answers, cuts)


def test_an_answer_like_the_last_one_goes_past_the_parser() -> None:
    framed = Framing()
    for number, body in enumerate((b"one", b"three", b"")):
        framed.begin(True)
        assert framed.feed(PLAIN % (number, len(body), body)) == body
        assert framed._counted is (number > 0)
        assert framed.head is not None
        assert framed.head.encode(b"i", True) == (
            PLAIN[:-6] % (number, len(body)) + b"\r\nx-request-id: i\r\n\r\n"
        ).replace(b"\r\n\r\nx-", b"\r\nx-")


# --- requests --------------------------------------------------------------------------------------------------------


def request(path: bytes, extra: bytes, body: bytes) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: h\r\n%bContent-Length: %d\r\n\r\n%b" % (path, extra, len(body), body)


PATHS = (b"/v1/completions", b"/v1/completions?a=1", b"/v1/completions?b", b"/v1/embeddings", b"/v1/none")
EXTRA = (
    b"", b"X-Request-Id: 1\r\n", b"x-request-id: 2\r\n", b"Connection: keep-alive\r\n", b"Connection: close\r\n",
    b"Expect: 100-continue\r\n", b"Authorization: Bearer k\r\n", b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
    b"Content-Length: 3\r\n", b"X: \r\n", b"X: a\r\n b\r\n", b"X: a\r\n", b"X: a b \r\n", b"X: \xe9\r\n",
    b"X: \x01\r\n", b"Authorization: Basic l \r\n", b"Proxy-Connection: close\r\n", b"Proxy-Connection: keep-alive\r\n",
)  # fmt: skip
BODIES = st.sampled_from([b"", b"{}", b"body", b"\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n\r\n"])
REQUESTS = st.one_of(
    st.builds(request, st.sampled_from(PATHS), st.sampled_from(EXTRA), BODIES),
    st.builds(request, st.just(PATHS[0]), st.just(EXTRA[1]), BODIES),
    st.builds(request, st.just(PATHS[0]), st.just(b""), BODIES),
    st.just(b"GET /hello HTTP/1.1\r\nHost: h\r\n\r\n"),
    st.just(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"),
    st.just(b"POST /v1/completions HTTP/1.0\r\nHost: h\r\nContent-Length: 1\r\n\r\nx"),
    st.just(b"\r\n"),
    st.sampled_from([b"GET /x HTTP/1.1\r\nX: ", b"P", b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n", b"\x00"]),
)


GET = b"GET /hello HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
LIKE = request(PATHS[0], b"", b"{}")


@settings(max_examples=300)
@example([LIKE, b"GET /x HTTP/1.1\r\nX: ", LIKE, b"\r\n", LIKE], [], True)
@example([LIKE, LIKE + b"GET /x HTTP/1.1\r\nX: ", LIKE, LIKE], [], True)
@example([request(PATHS[0], b"X: a \r\nContent-Length: 0 \r\n", b"")[:-21] + b"\r\n"] * 3, [], True)
@example([GET + LIKE, GET, LIKE, GET], [], True)
@example([LIKE, LIKE[:-1], LIKE[-1:] + LIKE, b"\r\n" + LIKE], [], True)
@given(st.lists(REQUESTS, min_size=1, max_size=7), st.lists(st.integers(0, 400), max_size=6), st.booleans())
def test_requests_are_the_same_past_the_parser(requests: list[bytes], cuts: list[int], whole: bool) -> None:
    """However they are cut, and also where each comes by itself, which is when most go past the parser."""
    stream = b"".join(requests)
    places = sorted({cut % (len(stream) + 1) for cut in cuts} | {0, len(stream)})
    pieces = requests if whole else [stream[a:b] for a, b in pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "Exchange", Asked)
        fast = asyncio.run(served(pieces))
        patch.setattr(protocol, "recurring", lambda *_: None)
        assert fast == asyncio.run(served(pieces))


def test_a_request_like_the_last_one_goes_past_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "Exchange", Asked)
    calls: list[object] = []
    monkeypatch.setattr(protocol.RelayProtocol, "on_headers_complete", wrapped(calls), raising=True)
    requests = [request(PATHS[0], b"X-Request-Id: %d\r\n" % n, b"b" * n) for n in (1, 3, 12)]
    log, _, closed = asyncio.run(served(requests))
    assert [one[-1] for one in log if isinstance(one, tuple)] == [b"b", b"bbb", b"b" * 12]
    assert [dict(one[2])[b"x-request-id"] for one in log if isinstance(one, tuple)] == [b"1", b"3", b"12"]
    assert len(calls) == 1
    assert not closed


def test_no_value_of_a_request_is_in_what_is_kept_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns outlive connections; a head's values are credentials, some of them in headers nobody knows."""
    monkeypatch.setattr(protocol, "Exchange", Asked)
    made: list[Alike] = []
    monkeypatch.setattr(protocol, "Alike", lambda *given: made.append(Alike(*given)) or made[-1])
    extra = b"Authorization: Bearer secret-1\r\nCookie: a=secret-2; b=secret-3\r\nX-Key: secret-4\r\n"
    asyncio.run(served([request(PATHS[0] + b"?key=secret-5", extra, b"{}")] * 2))
    asyncio.run(served([request(b"http://u:secret-6@h" + PATHS[0], extra, b"{}")] * 2))
    (alike,) = made
    assert alike.like.pattern in module._known.values()
    assert b"secret" not in b"".join(module._known)


def test_a_client_whose_heads_are_new_each_time_has_so_many_patterns_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "Exchange", Asked)
    module._known.clear()
    requests = [request(PATHS[0], b"X-%d: a\r\n" % number, b"{}") for number in range(3 * protocol.MADE)]
    log, _, closed = asyncio.run(served(requests))
    assert (len(log), closed) == (len(requests), False)
    assert len(module._known) == protocol.MADE


def wrapped(calls: list[object]) -> Any:
    real = protocol.RelayProtocol.on_headers_complete

    def on_headers_complete(self: protocol.RelayProtocol) -> None:
        calls.append(self)
        real(self)

    return on_headers_complete
