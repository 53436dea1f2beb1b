"""Codecs: what was encoded comes back, and nothing hostile costs more than a chunk's memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import IntegrityError
from heliosfs.store import codec
from heliosfs.store.recipe import MAX_CHUNK
from tests.support.mutation import mutate

ENCODERS = sorted(codec.CODECS.keys() - {codec.NONE})

chunks = st.one_of(
    st.binary(min_size=1, max_size=400),
    st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=9), st.integers(1, 300)),
    st.builds(lambda seed, size: weights(size, seed), st.integers(0, 99), st.integers(1, 3000)),
)


def weights(size: int, seed: int) -> bytes:
    """Numbers of two bytes with few exponents; the last one may be cut."""
    noise = random.Random(seed).randbytes(size)
    return b"".join(bytes([n, 0x3B + n % 3]) for n in noise)[:size]


@given(chunks, st.sampled_from(ENCODERS))
def test_what_was_encoded_comes_back(data: bytes, name: str) -> None:
    stored = codec.encode(name, data)
    if stored is not None:
        assert len(stored) < len(data)
        assert codec.decode(name, memoryview(stored), len(data)) == data
    assert codec.decode(codec.NONE, memoryview(data), len(data)) == data


@pytest.mark.parametrize("name", ENCODERS)
def test_the_longest_chunk(name: str) -> None:
    data = weights(1 << 16, 1) * (MAX_CHUNK >> 16)
    stored = codec.encode(name, data)
    assert stored is not None
    assert codec.decode(name, memoryview(stored), MAX_CHUNK) == data


def test_planes_are_what_makes_weights_shorter() -> None:
    data = weights(1 << 18, 2)
    plain, planes = codec.encode("zstd", data), codec.encode("planes2-zstd", data)
    assert planes is not None
    assert len(planes) < 0.7 * len(data)
    assert plain is None or len(planes) < len(plain)


@given(st.data(), st.sampled_from(ENCODERS))
def test_mutated_bytes_are_refused_or_give_a_chunk_of_the_length(data: st.DataObject, name: str) -> None:
    chunk = b"abcd" * 100
    stored = codec.encode(name, chunk)
    assert stored is not None
    try:
        found = codec.decode(name, memoryview(mutate(data, stored)), len(chunk))
    except IntegrityError:
        return
    assert len(found) == len(chunk)


def frame(size: int, **more: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, **more).compress(bytes(size))


STREAM = zstandard.ZstdCompressor(level=1).compressobj()
UNSIZED = STREAM.compress(bytes(1000)) + STREAM.flush()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (frame(1 << 26), "says that it has 67108864 bytes"),
        (frame(1001), "says that it has 1001 bytes"),
        (frame(999), "says that it has 999 bytes"),
        (UNSIZED, "says that it has"),
        (frame(1000)[:-1], "can't be decoded"),
        (frame(1000) + b"x", "can't be decoded"),
        (frame(1000) + frame(1000), "can't be decoded"),
        (b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello" + frame(1000), "says that it has 5 bytes"),
        (b"no frame at all", "can't be decoded"),
        (b"", "can't be stored in 0"),
        (bytes(1000), "can't be stored in 1000"),
    ],
    ids=[
        "bomb",
        "longer",
        "shorter",
        "unsized",
        "cut",
        "more",
        "two frames",
        "skippable",
        "noise",
        "empty",
        "not less",
    ],
)
@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_not_the_one_frame_is_refused(name: str, stored: bytes, message: str) -> None:
    stored = stored if len(stored) < 1000 or message.endswith("1000") else stored[:999]
    with pytest.raises(IntegrityError, match=message):
        codec.decode(name, memoryview(stored), 1000)


def lying(size: int, says: int) -> bytes:
    """A frame of so many zeros whose head says another size; both take four bytes there."""
    data = bytearray(frame(size))
    at = data.index(size.to_bytes(4, "little"), 4)
    data[at : at + 4] = says.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_frame_that_lies_about_its_size_costs_no_memory(name: str) -> None:
    """What it says is what is allocated; what it holds beyond that is never decoded."""
    for size, says in ((1 << 26, 1 << 20), (1 << 20, 1 << 21)):
        stored = memoryview(lying(size, says))[: (1 << 20) - 1]
        tracemalloc.start()
        try:
            with pytest.raises(IntegrityError):
                codec.decode(name, stored, says)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_a_chunk_that_no_recipe_allows_is_not_decoded() -> None:
    with pytest.raises(IntegrityError, match="no chunk has"):
        codec.decode("zstd", memoryview(frame(MAX_CHUNK + 1)), MAX_CHUNK + 1)


@pytest.mark.parametrize("name", ["brotli", "", "zstd ", "planes8-zstd"])
def test_an_unknown_codec_asks_for_an_upgrade(name: str) -> None:
    with pytest.raises(IntegrityError, match="upgrade"):
        codec.decode(name, memoryview(b"x"), 2)


def test_numbers_and_names_never_change() -> None:
    assert {c.number: c.name for c in codec.CODECS.values()} == {
        0: "none", 1: "zstd", 2: "planes2-zstd", 3: "planes4-zstd",
    }  # fmt: skip
