"""Answers of workers in every fragmentation: what goes on, where they end, and what is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.relay.framing import MAX_HEAD, BadAnswer, Framing, Mode

CHUNKS = b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = {
    "a length": b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nX-A: 1\r\n\r\nhello world",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: 1\r\n\r\n" + CHUNKS,
    "trailers": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKS[:-2] + b"x-sum: 1\r\ny: 2\r\n\r\n",
    "nothing": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "204": b"HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n",
    "304 with a length": b"HTTP/1.1 304 Not Modified\r\ncontent-length: 100\r\n\r\n",
    "after 100": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab",
    "after 103": b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab",
    "an empty chunked body": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "closing with a length": b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nab",
    "HTTP/1.0 with a length": b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nab",
    "a status without a phrase": b"HTTP/1.1 599\r\ncontent-length: 2\r\n\r\nab",
}
UNTIL_CLOSED = {
    "no length": b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello world",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\nhello world",
    "no length and no word of it": b"HTTP/1.1 200 OK\r\n\r\nhello world",
}


def body_of(answer: bytes) -> bytes:
    """What follows the last head."""
    return answer[answer.rindex(b"HTTP/1.") :].partition(b"\r\n\r\n")[2]


def run(*pieces: bytes, http11: bool = True) -> tuple[Framing, bytes]:
    framing = Framing()
    framing.begin(http11)
    return framing, b"".join(framing.feed(piece) for piece in pieces if piece)


@pytest.mark.parametrize("name", WHOLE)
def test_every_split_in_two_and_in_three_gives_the_same(name: str) -> None:
    answer = WHOLE[name]
    cuts = itertools.chain(
        ((cut, cut) for cut in range(len(answer))), itertools.combinations(range(0, len(answer), 3), 2)
    )
    for first, second in cuts:
        framing, out = run(answer[:first], answer[first:second], answer[second:])
        assert out == body_of(answer)
        assert framing.ended
        assert framing.head is not None


@pytest.mark.parametrize("name", WHOLE)
def test_one_byte_at_a_time(name: str) -> None:
    answer = WHOLE[name]
    framing = Framing()
    framing.begin(True)
    out = b""
    for number in range(len(answer)):
        assert not framing.ended, answer[:number]
        out += framing.feed(answer[number : number + 1])
    assert framing.ended
    assert out == body_of(answer)


@pytest.mark.parametrize("name", UNTIL_CLOSED)
@pytest.mark.parametrize("http11", [True, False])
def test_what_ends_with_the_connection_gets_an_end_of_its_own_where_the_client_knows_chunks(
    name: str, http11: bool
) -> None:
    answer = UNTIL_CLOSED[name]
    for cut in range(1, len(answer)):
        framing, out = run(answer[:cut], answer[cut:], http11=http11)
        assert not framing.ended
        out += framing.end_of_input()
        assert framing.ended
        assert framing.head is not None
        assert not framing.head.keep_alive
        if http11:
            again, _ = run(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + out)
            assert again.ended
            assert framing.head.mode is Mode.CHUNKED
            assert unchunked(out) == b"hello world"
        else:
            assert out == b"hello world"
            assert framing.head.mode is Mode.PLAIN


def unchunked(data: bytes) -> bytes:
    out = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        count = int(size.partition(b";")[0], 16)
        if not count:
            return out
        out, data = out + data[:count], data[count + 2 :]


@pytest.mark.parametrize("name", ["chunks", "trailers", "an empty chunked body"])
def test_chunks_are_taken_apart_for_old_clients(name: str) -> None:
    answer = WHOLE[name]
    for cut in range(1, len(answer)):
        framing, out = run(answer[:cut], answer[cut:], http11=False)
        assert framing.ended
        assert out == unchunked(body_of(answer))
        assert framing.head is not None
        assert b"transfer-encoding" not in framing.head.encode(b"id", False).lower()


def test_answers_follow_each_other_on_a_connection() -> None:
    framing = Framing()
    for answer in (*WHOLE.values(), *WHOLE.values()):
        if b"lose" in answer or b"HTTP/1.0" in answer:
            continue
        for http11 in (True, False, True):
            framing.begin(http11)
            assert framing.fresh
            out = framing.feed(answer[:20]) + framing.feed(answer[20:])
            assert framing.ended
            assert out == (body_of(answer) if http11 or b"hunked" not in answer else unchunked(body_of(answer)))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"NONSENSE\r\n\r\n", "Expected HTTP/"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nab", "Transfer-Encoding"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nab", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\nab", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nab", "not chunked"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "not chunked"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "."),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n", "chunk size"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabc\r\n", "."),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\nab\n0\n\n", "."),
        (b"HTTP/1.1 200 OK\ncontent-length: 2\n\nab", "."),
        (b"HTTP/1.1 200 OK\r\nx-a: a\x01b\r\ncontent-length: 0\r\n\r\n", "header value"),
        (b"HTTP/1.1 200 OK\r\nx-a : 1\r\ncontent-length: 0\r\n\r\n", "header token"),
        (b"HTTP/1.1 200 OK\r\nx-a: 1\r\n folded\r\ncontent-length: 0\r\n\r\n", "."),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nabHTTP/1.1 200 OK\r\n", "more than its answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab\r\n", "more than its answer"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nHTTP/1.1 200", "more than its answer"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n\r\n", "more than its answer"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: b\r\n\r\n\n", "more than its answer"),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\nabcde", "more than its answer"),
        (b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "more than its answer"),
        (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", "."),
        (b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n", "status 999"),
        (b"\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "empty"),
        (b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * MAX_HEAD, "more than 65536 bytes"),
    ],
)
def test_what_is_no_answer_is_refused_at_every_split(answer: bytes, why: str) -> None:
    step = max(1, len(answer) // 300)
    for cut in range(0, len(answer), step):
        framing = Framing()
        framing.begin(True)
        with pytest.raises(BadAnswer, match=why):
            feed_all(framing, answer[:cut], answer[cut:])


@pytest.mark.parametrize("name", [name for name in WHOLE if body_of(WHOLE[name])])
def test_a_connection_that_ends_inside_an_answer(name: str) -> None:
    answer = WHOLE[name]
    for cut in range(len(answer)):
        framing, _ = run(answer[:cut])
        with pytest.raises(BadAnswer, match="ended inside"):
            framing.end_of_input()


def feed_all(framing: Framing, *pieces: bytes) -> None:
    for piece in pieces:
        if piece:
            framing.feed(piece)
    framing.feed(b"")


def test_headers_go_on_as_they_are_but_for_those_of_the_connection() -> None:
    framing, _ = run(
        b"HTTP/1.1 200 Fine\r\nServer: uvicorn\r\nConnection: keep-alive, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 5\r\n"
        b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nProxy-Authenticate: Basic\r\nTrailer: x\r\nUpgrade: h2c\r\n"
        b"X-Odd: k\xc3\xa4se\r\nContent-Length: 2\r\n\r\nab"
    )
    assert framing.head is not None
    assert framing.head.encode(b"id-1", True) == (
        b"HTTP/1.1 200 OK\r\nServer: uvicorn\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-Odd: k\xc3\xa4se\r\n"
        b"Content-Length: 2\r\nx-request-id: id-1\r\n\r\n"
    )


def test_a_workers_request_id_stays_and_the_end_of_a_connection_is_announced() -> None:
    framing, _ = run(b"HTTP/1.1 200 OK\r\nX-Request-ID: theirs\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
    assert framing.head is not None
    assert framing.head.encode(b"ours", False) == (
        b"HTTP/1.1 200 OK\r\nX-Request-ID: theirs\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("headers", "events"),
    [
        (b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n", True),
        (b"Content-Type: Text/Event-Stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n", True),
        (b"content-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n", False),
        (b"content-type: text/event-stream\r\ncontent-length: 5\r\n", False),
        (b"content-type: application/json\r\ntransfer-encoding: chunked\r\n", False),
        (b"transfer-encoding: chunked\r\n", False),
    ],
)
def test_streams_of_events_are_known(headers: bytes, events: bool) -> None:
    framing, _ = run(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n")
    assert framing.head is not None
    assert framing.head.events is events


def test_it_knows_when_no_chunk_is_open() -> None:
    body = b"d\r\ndata: hello\n\n\r\n"
    for cut in range(len(b"d\r\n"), len(body)):
        framing, _ = run(EVENTS, body[:cut])
        assert not framing.between_chunks
        framing.feed(body[cut:])
        assert framing.between_chunks


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    st.lists(st.integers(0, 400), max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_any_body_in_any_pieces(parts: list[bytes], cuts: list[int], chunked: bool, http11: bool) -> None:
    payload = b"".join(parts)
    if chunked:
        body = b"".join(b"%X\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        answer = b"HTTP/1.1 200 OK\r\nTRANSFER-ENCODING: Chunked\r\n\r\n" + body
    else:
        body = payload
        answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    edges = sorted({0, len(answer), *(cut for cut in cuts if cut < len(answer))})
    framing, out = run(*(answer[a:b] for a, b in itertools.pairwise(edges)), http11=http11)
    assert framing.ended
    assert out == (body if http11 or not chunked else payload)
