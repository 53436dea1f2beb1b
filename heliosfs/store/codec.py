"""Codecs: how a chunk's bytes are encoded where they lie. The one place that turns stored bytes into a chunk and back.

``zstd`` is one Zstandard frame (RFC 8878) that states its content's size. ``planes2-zstd`` and ``planes4-zstd`` are the
same of the chunk's bytes in another order: first those at 0, k, 2k…, then those at 1, k + 1…, and so on. In the weights
of a model, floating-point numbers of k bytes, sign and exponent come to stand together that way, and of these a few
values make up nearly everything; the mantissa is noise, which zstd copies. (Hershcovitch et al., ZipNN, 2024, says what
that is worth.) docs/format.md is normative.

Encoded bytes come from anywhere, so a frame is believed only as far as the chunk's length: what says, or turns out to
hold, another one is refused before or while it is decoded, never after memory was spent on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from helios.errors import IntegrityError
from heliosfs.store.recipe import MAX_CHUNK

if TYPE_CHECKING:
    from typing_extensions import Buffer

NONE: Final = "none"

LEVEL: Final = 3
"""Of ``zstd``: text, tables, quantised weights. Higher levels win little there and cost a multiple."""
PLANES_LEVEL: Final = 1
PLANES_PARAMETERS: Final = {"min_match": 7, "hash_log": 6}
"""Of planes, where all gain lies in the frequency of bytes: a search for repetitions finds chance ones, whose
description takes more room than the bytes. With a table this small it finds runs, and zstd gets within 0.5% of the
entropy at 2.5 times the speed (benchmarks/compression.py)."""


@dataclass(frozen=True, slots=True)
class Codec:
    """``number`` is its name in packs; ``planes`` how many planes the bytes are split into, 0: not compressed."""

    name: str
    number: int
    planes: int


CODECS: Final = {
    codec.name: codec
    for codec in (Codec(NONE, 0, 0), Codec("zstd", 1, 1), Codec("planes2-zstd", 2, 2), Codec("planes4-zstd", 3, 4))
}
BY_NUMBER: Final = {codec.number: codec for codec in CODECS.values()}


def check(codec: str, length: int, encoded: int) -> None:
    """Raises IntegrityError unless a chunk of ``length`` bytes can take ``encoded`` bytes in this codec."""
    if codec not in CODECS:
        raise IntegrityError(f"codec {codec[:40]!r} is not known to this Helios; upgrade it")
    if encoded != length if codec == NONE else not 0 < encoded < length:
        raise IntegrityError(f"a chunk of {length} bytes can't be stored in {encoded} with codec {codec}")


def encode(codec: str, data: Buffer) -> bytes | None:
    """The chunk's bytes in a codec; None where that is not shorter."""
    import zstandard

    raw = bytes(data)
    planes = CODECS[codec].planes
    if not planes or not raw:
        return None
    if planes == 1:
        out: bytes = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(raw)
        return out if len(out) < len(raw) else None
    more: dict[str, Any] = PLANES_PARAMETERS
    parameters = zstandard.ZstdCompressionParameters.from_level(PLANES_LEVEL, write_content_size=True, **more)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(raw))
    parts = []
    for first in range(planes):
        parts.append(stream.compress(raw[first::planes]))
        # A block, which has one table of frequencies, holds bytes of one plane.
        parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
    out = b"".join(parts)
    return out if len(out) < len(raw) else None


def decode(codec: str, data: memoryview, length: int) -> memoryview:
    """The chunk of ``length`` bytes whose encoded bytes are ``data``; of codec ``none``, ``data`` itself.

    Takes twice ``length`` of memory at most, whatever ``data`` says. Raises IntegrityError.
    """
    check(codec, length, len(data))
    if length > MAX_CHUNK:
        raise IntegrityError(f"no chunk has {length} bytes")
    planes = CODECS[codec].planes
    if not planes:
        return data
    raw = _decompress(data, length)
    if planes == 1:
        return memoryview(raw)
    out, start = bytearray(length), 0
    for first in range(planes):
        count = len(range(first, length, planes))
        out[first::planes] = raw[start : start + count]
        start += count
    return memoryview(out)


def _decompress(data: memoryview, length: int) -> bytes:
    """The content of the one frame that ``data`` is."""
    import zstandard

    try:
        said = zstandard.get_frame_parameters(data)
        if said.content_size != length:
            raise IntegrityError(f"an encoded chunk says that it has {said.content_size} bytes, not {length}")
        if said.dict_id:
            raise IntegrityError(f"an encoded chunk needs the dictionary {said.dict_id}: damaged")
        # The content's size is known, so this is what is allocated; a frame that holds more, or less, fails.
        decompressor = zstandard.ZstdDecompressor(max_window_size=2 * MAX_CHUNK)
        out: bytes = decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"an encoded chunk can't be decoded: {error}") from None
    if len(out) != length:
        raise IntegrityError(f"an encoded chunk holds {len(out)} bytes, not {length}")
    return out
