"""What a Xet client does with a reconstruction: it fetches ranges of xorbs and puts their chunks together."""

from __future__ import annotations

from collections.abc import Callable

from registry.xet.layout import Reconstruction


def chunks_of(served: bytes) -> list[bytes]:
    """The chunks of a piece of a xorb."""
    out, at = [], 0
    while at < len(served):
        version, stored, scheme = served[at], int.from_bytes(served[at + 1 : at + 4], "little"), served[at + 4]
        length = int.from_bytes(served[at + 5 : at + 8], "little")
        assert (version, scheme, stored) == (0, 0, length)
        out.append(served[at + 8 : at + 8 + length])
        assert len(out[-1]) == length, "a chunk is cut off"
        at += 8 + length
    return out


def put_together(plan: Reconstruction, fetch: Callable[[int, int, int], bytes], count: int) -> bytes:
    """``count`` bytes of the file; ``fetch`` gives the chunks from a first one to one after the last of a xorb."""
    known = {
        (number, first, stop): chunks_of(fetch(number, first, stop))
        for number, ranges in plan.fetch.items()
        for first, stop in ranges
    }
    out = bytearray()
    for part in plan.parts:
        (key,) = [k for k in known if k[0] == part.xorb and k[1] <= part.first and part.stop <= k[2]]
        data = b"".join(known[key][part.first - key[1] : part.stop - key[1]])
        assert len(data) == part.length
        out += data
    return bytes(out[plan.skip : plan.skip + count])
