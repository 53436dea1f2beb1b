"""Xorbs as they are uploaded: what the protocol writes is decoded, anything else is refused."""

import contextlib
import io

import lz4.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import InvalidInput, Unavailable
from registry.hub.upload.xorbs import MAX_CHUNK, XorbSource, decode, scan


def grouped(data: bytes) -> bytes:
    return b"".join(data[n::4] for n in range(4))


def encode(data: bytes, scheme: int) -> bytes:
    body = data if scheme == 0 else lz4.frame.compress(data if scheme == 1 else grouped(data))
    return b"\0" + len(body).to_bytes(3, "little") + bytes([scheme]) + len(data).to_bytes(3, "little") + body


CHUNKS = st.lists(st.tuples(st.binary(min_size=1, max_size=3000), st.sampled_from([0, 1, 2])), min_size=1, max_size=6)


@given(CHUNKS, st.booleans(), st.integers(1, 5000))
def test_files_come_out_of_chunks(tmp_path_factory, chunks, footer, piece):
    path = tmp_path_factory.mktemp("xorb") / "x"
    path.write_bytes(b"".join(encode(*chunk) for chunk in chunks) + (b"XETBLOB\1rest" if footer else b""))
    places = scan(path)
    assert [place[3] for place in places] == [len(data) for data, _ in chunks]
    source = XorbSource([(path, places[1:]), (path, places[:1]), (path, places)])
    parts = [data for data, _ in chunks]
    wanted = b"".join([*parts[1:], parts[0], *parts])
    assert source.size == len(wanted)
    got, buffer = b"", bytearray(piece)
    while count := source.readinto(memoryview(buffer)):
        got += buffer[:count]
    assert got == wanted


def head(length: int, scheme: int, size: int, version: int = 0) -> bytes:
    return bytes([version]) + length.to_bytes(3, "little") + bytes([scheme]) + size.to_bytes(3, "little")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"XETBLOB\1", b"short", head(1, 0, 1, 1) + b"x", head(1, 9, 1) + b"x", head(2, 0, 2) + b"x",
        head(0, 0, 1), head(1, 0, 0) + b"x", head(1, 0, MAX_CHUNK + 1) + b"x", encode(b"a", 0) + b"\0",
        encode(b"a", 0) + b"\1" * 20,
    ],
)  # fmt: skip
def test_what_is_no_xorb(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InvalidInput, match="xorb"):
        scan(tmp_path / "x")


def test_a_chunk_is_as_long_as_its_head_says():
    bomb = lz4.frame.compress(bytes(64 << 20))
    for data, scheme, size in (
        (b"abc", 0, 2), (lz4.frame.compress(b"abc"), 1, 2), (lz4.frame.compress(b"abc"), 1, 4),
        (lz4.frame.compress(b"abc")[:-6], 1, 3), (b"no frame at all", 1, 3), (b"", 1, 3), (bomb, 1, 1000),
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            decode(data, scheme, size)


@given(st.binary(max_size=200), st.sampled_from([0, 1, 2]), st.integers(1, 300))
def test_no_chunk_breaks_it(data, scheme, size):
    with contextlib.suppress(InvalidInput):
        assert len(decode(data, scheme, size)) == size


@given(st.binary(max_size=300))
def test_no_file_breaks_it(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("xorb") / "x"
    path.write_bytes(data)
    try:
        places = scan(path)
    except InvalidInput:
        return
    assert all(at + length <= len(data) for at, length, _, _ in places)


def test_a_xorb_that_has_gone_meanwhile(tmp_path):
    (tmp_path / "x").write_bytes(encode(b"abc", 0))
    source = XorbSource([(tmp_path / "x", scan(tmp_path / "x"))])
    (tmp_path / "x").unlink()
    with pytest.raises(Unavailable, match="upload again"):
        source.readinto(memoryview(bytearray(10)))


def test_a_source_reads_no_more_than_it_is_asked_for(tmp_path):
    (tmp_path / "x").write_bytes(encode(b"abcdef", 0))
    source = XorbSource([(tmp_path / "x", scan(tmp_path / "x"))])
    out = io.BytesIO()
    for count in (1, 2, 0, 3):
        buffer = memoryview(bytearray(count))
        out.write(buffer[: source.readinto(buffer)])
    assert out.getvalue() == b"abcdef"
