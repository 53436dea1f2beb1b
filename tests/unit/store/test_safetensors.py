"""The strict reader against the real library: what we take, every loader takes; what we refuse is named."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from helios.errors import InvalidInput
from heliosfs.store.safetensors import DTYPE_BITS, MAX_HEADER, Tensor, header_length, parse_header
from tests.support.mutation import mutate


def document(header: object, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def ours(file: bytes) -> list[Tensor]:
    length = header_length(file[:8], len(file), "f")
    return parse_header(file[8 : 8 + length], len(file), "f")


def real(file: bytes) -> bool:
    try:
        deserialize(file)
    except SafetensorError:
        return False
    return True


def accepted(file: bytes) -> bool:
    try:
        ours(file)
    except InvalidInput:
        return False
    return True


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Well-formed files: any types and shapes, in an order of their own in the header."""
    header: dict[str, Any] = {}
    offset = 0
    for name in draw(st.lists(names.filter(lambda n: n != "__metadata__"), unique=True, max_size=5)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(shapes)
        bits = DTYPE_BITS[dtype]
        for dimension in shape:
            bits *= dimension
        if bits % 8:
            continue
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + bits // 8]}
        offset += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.none() | st.dictionaries(names, names, max_size=3))
    items = draw(st.permutations(list(header.items())))
    spaces = b" " * draw(st.integers(0, 9))
    encoded = json.dumps(dict(items), ensure_ascii=draw(st.booleans())).encode()
    return document(encoded + spaces, bytes(offset))


@given(files())
def test_well_formed_files_are_read_as_the_library_reads_them(file: bytes) -> None:
    assert real(file)
    mine = {t.name: (t.dtype, list(t.shape), file[t.start : t.end]) for t in ours(file)}
    theirs = {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in deserialize(file)}
    assert mine == theirs


@given(files(), st.data())
def test_whatever_is_accepted_is_accepted_by_the_library(file: bytes, data: st.DataObject) -> None:
    """Mutations of the header: numbers, keys, brackets, bytes, the length field."""
    mutated = mutate(data, file)
    if accepted(mutated):
        assert real(mutated) or b"-0" in mutated


@given(st.binary(max_size=80))
@example(b"")
@example(struct.pack("<Q", 0))
@example(b"\xff" * 8)
def test_any_bytes_are_refused_or_valid(data: bytes) -> None:
    for file in (data, document(data)):
        if accepted(file):
            assert real(file)


GOOD = {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}


def entry(**values: object) -> dict[str, object]:
    return {"a": {**GOOD["a"], **values}}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "is truncated"),
        (b"1234567", "is truncated"),
        (document(GOOD, b"ab")[:20], "header of 60 bytes is truncated"),
        (struct.pack("<Q", MAX_HEADER + 1) + b"{}", "more than 25000000"),
        (document(GOOD, b"a"), "the file has 69"),
        (document(GOOD, b"abc"), "the file has 71"),
        (document(b"[]"), "not valid"),
        (document(b"{"), "not valid"),
        (document(json.dumps(GOOD).encode("utf-16-le"), b"ab"), "not valid"),
        (document(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"ab"), "not valid"),
        (document(b'{"\xff":1}'), "not valid"),
        (document(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not valid"),
        (document({"__metadata__": {"a": 1}}), "not valid"),
        (document({"__metadata__": []}), "not valid"),
        (document(b'{"a":%b,"a":%b}' % ((json.dumps(GOOD["a"]).encode(),) * 2), b"ab"), "'a' appears twice"),
        (document(b'{"a":%b,"\\u0061":%b}' % ((json.dumps(GOOD["a"]).encode(),) * 2), b"ab"), "'a' appears twice"),
        (document(b'{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab"), "'dtype' appears"),
        (document(b'{"__metadata__":{},"__metadata__":{}}'), "appears twice"),
        (document(entry(dtype="U9"), b"ab"), "tensor 'a' has the unknown type 'U9'"),
        (document(entry(dtype=None), b"ab"), "tensor 'a' in its header is malformed"),
        (document(entry(shape=[2.0]), b"ab"), "tensor 'a' in its header is malformed"),
        (document(entry(shape=[-2]), b"ab"), "tensor 'a' in its header is malformed"),
        (document(entry(shape=[True], data_offsets=[0, 1]), b"a"), "tensor 'a' in its header is malformed"),
        (document(entry(data_offsets=[0, 1, 2]), b"ab"), "tensor 'a' in its header is malformed"),
        (document({"a": 1}), "tensor 'a' in its header is malformed"),
        (document(entry(shape=[3]), b"ab"), "tensor 'a' has 2 bytes"),
        (document(entry(data_offsets=[2, 0]), b"ab"), "tensor 'a' has -2 bytes"),
        (document(entry(shape=[2**40, 2**40]), b"ab"), "tensor 'a' has 2 bytes"),
        (document(entry(dtype="F4", shape=[3]), b"ab"), "tensor 'a' has 2 bytes"),
        (document(entry(data_offsets=[1, 3]), b"xab"), "tensor 'a' leaves a gap before it"),
        (document({**GOOD, "b": GOOD["a"]}, b"ab"), "tensor 'b' overlaps the tensor before it"),
        (
            document({**GOOD, "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"abc"),
            "tensor 'b' overlaps the tensor before it",
        ),
    ],
)
def test_malformed_files_are_refused_with_the_reason(file: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"^f: .*{message}"):
        ours(file)


def test_names_that_look_like_keys_are_fine() -> None:
    header = {"data_offsets": GOOD["a"], "__metadata__": {"dtype": "x", "shape": '"y"'}}
    assert [t.name for t in ours(document(header, b"ab"))] == ["data_offsets"]


def test_a_file_of_the_library_itself(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    file = save({"w": numpy.arange(12, dtype="float32").reshape(3, 4), "b": numpy.zeros(3, "int64")}, {"format": "pt"})
    found = {t.name: t for t in ours(file)}
    assert found["w"].shape == (3, 4)
    assert file[found["w"].start : found["w"].end] == numpy.arange(12, dtype="float32").tobytes()
