"""Packs: the index at their end gives back what is in them, and a damaged one is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import IntegrityError
from heliosfs.store import codec, pack
from heliosfs.store.recipe import MAX_CHUNK

contents = st.lists(st.binary(min_size=1, max_size=60), max_size=10)


def make(chunks: Sequence[bytes]) -> tuple[bytes, list[pack.PackEntry]]:
    data = bytearray(pack.head())
    entries = []
    for chunk in chunks:
        entries.append(pack.PackEntry(blake3(chunk).digest(), len(data), len(chunk), len(chunk)))
        data += chunk
    return bytes(data) + pack.tail(entries), entries


def read(data: bytes) -> list[pack.PackEntry]:
    """As a recovery would: the trailer, then the index."""
    trailer = data[-pack.TRAILER_SIZE :]
    offset, length = pack.index_span(trailer, len(data))
    return pack.parse(data[: pack.HEAD_SIZE], data[offset : offset + length], trailer, len(data))


@given(contents)
def test_a_pack_can_be_read_back_from_its_bytes_alone(chunks: list[bytes]) -> None:
    data, entries = make(chunks)
    assert read(data) == entries
    for entry, chunk in zip(entries, chunks, strict=True):
        assert data[entry.offset : entry.offset + entry.length] == chunk
        assert blake3(chunk).digest() == entry.id


@given(st.lists(st.tuples(st.sampled_from(sorted(codec.CODECS)), st.binary(min_size=1, max_size=60)), max_size=10))
def test_a_pack_of_encoded_chunks_can_be_read_back_too(chunks: list[tuple[str, bytes]]) -> None:
    data, entries = bytearray(pack.head(encoded=True)), []
    for name, chunk in chunks:
        chunk = chunk * 20  # so that it gets shorter
        stored = codec.encode(name, chunk)
        name = codec.NONE if stored is None else name
        stored = stored or chunk
        entries.append(pack.PackEntry(blake3(chunk).digest(), len(data), len(chunk), len(stored), name))
        data += stored
    assert read(bytes(data) + pack.tail(entries)) == entries
    if any(entry.codec != codec.NONE for entry in entries):
        data[4] = 1
        with pytest.raises(IntegrityError, match="upgrade"):
            read(bytes(data) + pack.tail(entries))


@pytest.mark.parametrize(("number", "length", "encoded"), [(1, 10, 10), (1, 10, 11), (2, 10, 0), (0, 10, 9)])
def test_lengths_that_a_codec_never_gives_are_refused(number: int, length: int, encoded: int) -> None:
    entry = pack.PackEntry(b"a" * 32, pack.HEAD_SIZE, length, encoded, codec.BY_NUMBER[number].name)
    tail = pack.tail([entry])
    size = pack.HEAD_SIZE + encoded + len(tail)
    with pytest.raises(IntegrityError, match=f"a chunk of {length} bytes can't be stored in {encoded}"):
        pack.parse(pack.head(encoded=True), tail[: -pack.TRAILER_SIZE], tail[-pack.TRAILER_SIZE :], size)


@given(contents, st.data())
def test_damage_outside_the_chunks_is_noticed(chunks: list[bytes], data: st.DataObject) -> None:
    whole, _ = make(chunks)
    end = len(whole) - pack.TRAILER_SIZE - pack.ENTRY_SIZE * len(chunks)
    outside = [*range(pack.HEAD_SIZE), *range(end, len(whole))]
    at = data.draw(st.sampled_from(outside))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        read(bytes(damaged))


@given(contents, st.data())
def test_a_cut_or_grown_pack_is_refused(chunks: list[bytes], data: st.DataObject) -> None:
    whole, _ = make(chunks)
    with pytest.raises(IntegrityError):
        read(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(IntegrityError):
        read(whole + data.draw(st.binary(min_size=1, max_size=20)))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        read(data)
    with pytest.raises(IntegrityError):
        read(data + make([])[0][-pack.TRAILER_SIZE :])


@pytest.mark.parametrize("length", [0, MAX_CHUNK + 1])
def test_no_chunk_is_empty_or_too_long(length: int) -> None:
    tail = pack.tail([pack.PackEntry(b"a" * 32, pack.HEAD_SIZE, length, length)])
    size = pack.HEAD_SIZE + length + len(tail)
    with pytest.raises(IntegrityError, match=f"a chunk of {length} bytes"):
        pack.parse(pack.head(), tail[: -pack.TRAILER_SIZE], tail[-pack.TRAILER_SIZE :], size)


def test_a_gap_between_chunks_is_a_bug_of_the_writer() -> None:
    with pytest.raises(ValueError, match="starts at 33, not at 32"):
        pack.tail([pack.PackEntry(b"a" * 32, 33, 5, 5)])


@pytest.mark.parametrize("at", [4, 6, 8, 24])
def test_unknown_versions_flags_and_keys_ask_for_an_upgrade(at: int) -> None:
    data = bytearray(make([b"x"])[0])
    data[at] ^= 4
    with pytest.raises(IntegrityError, match="upgrade"):
        read(bytes(data))
