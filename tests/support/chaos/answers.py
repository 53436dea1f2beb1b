"""What a worker answers, byte for byte, by the request alone: workers and clients make the same."""

from __future__ import annotations

from typing import Final

END: Final = b"0\r\n\r\n"


def event(seed: int, number: int) -> bytes:
    """One event of a stream, as a chunk."""
    word = (seed * 2654435761 + number * 40503) & 0xFFFFFFFF
    data = b'data: {"id":"c-%d","choices":[{"index":0,"delta":{"content":"%08x "}}]}\n\n' % (seed, word)
    return chunk(data)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream(seed: int, count: int) -> list[bytes]:
    """The chunks of a stream, its end included."""
    return [*(event(seed, number) for number in range(count)), chunk(b"data: [DONE]\n\n") + END]


def whole(seed: int, count: int) -> bytes:
    """The body of an answer that is no stream."""
    words = b" ".join(b"%08x" % ((seed * 2654435761 + number * 40503) & 0xFFFFFFFF) for number in range(count))
    return b'{"id":"c-%d","choices":[{"index":0,"message":{"content":"%b"}}]}' % (seed, words)
