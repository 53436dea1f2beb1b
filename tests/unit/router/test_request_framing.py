"""A request is the same wherever it is cut: at every byte, in two and in three, and byte by byte."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from helios.http import protocol as below
from router.relay import protocol
from tests.support.asked import Asked, served

LINE = b"POST /v1/completions?a=1 HTTP/1.1\r\nHost: h\r\n"
LENGTH = LINE + b"Content-Length: 8\r\n\r\n" + b'{"a": 1}'
CHUNKED = LINE + b"Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123\r\n\r\n89\r\n0\r\nx-trailer: 1\r\n\r\n"
REQUESTS = {
    "a length": LENGTH,
    "chunks": CHUNKED,
    "no body": LINE + b"Content-Length: 0\r\n\r\n",
    "an expectation": LINE + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    "an offer": LINE + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
    "the last": LINE + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}",
    "an old version": LINE.replace(b"1.1", b"1.0") + b"Content-Length: 2\r\n\r\n{}",
    "a pipeline": LENGTH + LENGTH + b"GET /hello HTTP/1.1\r\nHost: h\r\n\r\n" + CHUNKED + LENGTH,
    "nonsense behind it": LENGTH + b"NONSENSE\r\n\r\n",
    "two lengths": LINE + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_the_same_wherever_it_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "Exchange", Asked)
    stream = REQUESTS[name]

    async def every_cut() -> None:
        whole = await served([stream])
        assert whole[0] or whole[1]
        places = [[cut] for cut in range(1, len(stream))]
        places += [[cut, min(cut + 2, len(stream) - 1)] for cut in range(1, len(stream) - 1)]
        places.append(list(range(1, len(stream))))
        for cuts in places:
            pieces = [stream[a:b] for a, b in pairwise([0, *cuts, len(stream)])]
            assert await served([piece for piece in pieces if piece]) == whole, cuts

    asyncio.run(every_cut())


@pytest.mark.parametrize("before", ["nothing", "a length", "a pipeline"])
@pytest.mark.parametrize("begun", [b"", b"P", LINE, LINE + b"Content-Length: 8\r\n"])
def test_a_head_has_its_time_whatever_came_before(before: str, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody keeps a connection with a head that does not end; one that was answered may be idle for longer."""
    monkeypatch.setattr(protocol, "Exchange", Asked)
    monkeypatch.setattr(below, "HEAD_S", 0.1)
    monkeypatch.setattr(below, "SILENT_S", 0.1)
    first = REQUESTS.get(before, b"")
    log, written, closed = asyncio.run(served([first, begun], 30 if begun or not first else 0.3))
    assert closed == bool(begun or not first)
    assert (log, written) == asyncio.run(served([first]))[:2]
