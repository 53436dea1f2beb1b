"""Which codec a chunk is worth, by trying: no I/O in here.

A sample of the chunk is encoded in each codec, and the chunk in the one that was best. So nothing has to be known of
what the bytes are, and a file that lies about it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from heliosfs.store import codec

SLICE: Final = 32 << 10
"""Bytes of each of the two parts of a sample."""
SAMPLE: Final = 2 * SLICE
ALIGN: Final = 8
"""A sample's parts begin at a multiple of the longest number, so that planes are the same ones as in the chunk."""
LEAST: Final = 0.03
"""A chunk that would lose less than this share stays as it is: reading it is cheaper."""


def sampled(length: int) -> list[range]:
    """Which bytes of a chunk of ``length`` bytes to try: two parts far from each other, or all of a short chunk."""
    if length <= SAMPLE:
        return [range(length)]
    free = length - SAMPLE
    starts = (free // 4, SLICE + free * 3 // 4)
    return [range(start - start % ALIGN, start - start % ALIGN + SLICE) for start in starts]


def best_codec(sample: bytes) -> tuple[str, float]:
    """The codec that makes the sample shortest, and to which share of its length; ``none`` and 1: none is worth it."""
    found, length = codec.NONE, (1 - LEAST) * len(sample)
    for name in codec.CODECS:
        data = codec.encode(name, sample)
        if data is not None and len(data) < length:
            found, length = name, len(data)
    return (found, length / len(sample)) if found != codec.NONE else (found, 1.0)


def encode(chunk: bytes) -> tuple[str, bytes]:
    """The chunk in the codec that is best for it, and that codec's name."""
    sample = b"".join(chunk[part.start : part.stop] for part in sampled(len(chunk)))
    name = best_codec(sample)[0]
    data = codec.encode(name, chunk)
    if data is None or len(data) > (1 - LEAST) * len(chunk):
        return codec.NONE, chunk
    return name, data


def estimate(lengths: list[int], read: Callable[[int, range], bytes], most: int) -> float:
    """About how many bytes chunks of these lengths would take encoded, from samples of at most ``most`` of them.

    ``read(n, part)`` gives the bytes ``part`` of chunk number ``n``.
    """
    if not lengths:
        return 0.0
    chosen = sorted({n * len(lengths) // min(most, len(lengths)) for n in range(min(most, len(lengths)))})
    seen = taken = 0.0
    for n in chosen:
        sample = b"".join(read(n, part) for part in sampled(lengths[n]))
        seen += lengths[n]
        taken += lengths[n] * best_codec(sample)[1]
    return sum(lengths) * taken / seen
