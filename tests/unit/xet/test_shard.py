"""Shards: what hf-xet writes is read, anything else is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import IntegrityError
from registry.xet.cutter import lay_out
from registry.xet.hashes import chunk_hash, file_hash, from_text, to_text, xorb_hash
from registry.xet.shard import TAG, Shards

CHUNKS = [(chunk_hash(b"%d" % number * length), length) for number, length in enumerate((5, 70, 3))]
XORB = xorb_hash(CHUNKS)
FILE = file_hash([*CHUNKS, CHUNKS[1]])
END = b"\xff" * 32 + bytes(16)


def shard(flags: int = 1 << 31 | 1 << 30, file: bytes = FILE, xorb: bytes = XORB) -> bytes:
    terms = [(xorb, 0, 78, 0, 3), (xorb, 0, 70, 1, 2)]
    extra = len(terms) * (flags >> 31 & 1) + (flags >> 30 & 1)
    return b"".join(
        [
            struct.pack("<32sQQ", TAG, 2, 0),
            struct.pack("<32sIIQ", file, flags, len(terms), 0),
            *(struct.pack("<32s4I", *term) for term in terms),
            b"v" * 48 * extra,
            END,
            struct.pack("<32s4I", xorb, 0, len(CHUNKS), 78, 102),
            *(struct.pack("<32sIIQ", digest, 0, length, 0) for digest, length in CHUNKS),
            END,
            b"look-up tables",
        ]
    )


@pytest.mark.parametrize("flags", [0, 1 << 31, 1 << 30, 1 << 31 | 1 << 30])
def test_a_shard_is_read(flags: int) -> None:
    shards = Shards()
    shards.add(shard(flags))
    layout = lay_out("a" * 64, 148, FILE, shards)
    assert [(part.first, part.stop, part.length) for part in layout.reconstruct(0, 148).parts] == [
        (0, 3, 78),
        (1, 2, 70),
    ]


def test_what_the_hashes_contradict_is_refused() -> None:
    for wrong in (shard(file=b"f" * 32), shard(xorb=b"x" * 32)):
        shards = Shards()
        shards.add(wrong)
        (file,) = shards.files
        with pytest.raises(IntegrityError, match="another hash"):
            lay_out("a" * 64, 148, file, shards)
    shards = Shards()
    shards.add(shard())
    with pytest.raises(IntegrityError, match="148 of 149"):
        lay_out("a" * 64, 149, FILE, shards)
    with pytest.raises(IntegrityError, match="do not hold the file"):
        lay_out("a" * 64, 148, b"g" * 32, shards)
    shards.xorbs.clear()
    with pytest.raises(IntegrityError, match="do not hold the xorb"):
        lay_out("a" * 64, 148, FILE, shards)


def test_a_large_upload_comes_in_several_shards() -> None:
    empty = struct.pack("<32sQQ", TAG, 2, 0)
    start = shard().index(END)
    files, xorbs = shard()[: start + 48] + END, empty + END + shard()[start + 48 :]
    for order in ([files, xorbs], [xorbs, files], [xorbs, files, xorbs, files]):
        shards = Shards()
        for each in order:
            shards.add(each)
        assert lay_out("a" * 64, 148, FILE, shards).size == 148


@given(st.data())
def test_damage_is_an_integrity_error_or_harmless(data: st.DataObject) -> None:
    found = bytearray(shard())
    if data.draw(st.booleans()):
        del found[data.draw(st.integers(0, len(found) - 1)) :]
    else:
        found[data.draw(st.integers(0, len(found) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        shards = Shards()
        shards.add(bytes(found))
        layout = lay_out("a" * 64, 148, FILE, shards)
    except IntegrityError:
        return
    assert layout.size == 148


@given(st.binary(min_size=32, max_size=32))
def test_hashes_as_text(digest: bytes) -> None:
    text = to_text(digest)
    assert from_text(text) == digest
    assert text[:16] == digest[:8][::-1].hex()
