"""Placements: few runs, the right place for every chunk, and nothing believed that the recipe contradicts."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import IntegrityError
from heliosfs.store.placement import NO_CODEC, ChunkLocation, PlacedBlob, Placement
from heliosfs.store.recipe import Recipe
from tests.support.mutation import mutate

BLOB = hashlib.sha256(b"blob").hexdigest()
KEYS = [f"public/packs/{i:02x}/{i:032x}" for i in range(3)]
SIZE = 10_000


def describe(key: str) -> tuple[str, int]:
    return f"/api/v1/objects/{key}", SIZE


@st.composite
def placed(draw: st.DrawFn) -> tuple[Recipe, list[ChunkLocation]]:
    """A recipe and a place for each chunk, some encoded: often right behind the one before, so that runs form."""
    lengths = draw(st.lists(st.integers(2, 50), max_size=15))
    recipe = Recipe.build(BLOB, [(bytes([i]) * 32, length) for i, length in enumerate(lengths)])
    locations: list[ChunkLocation] = []
    for length in lengths:
        codec = draw(st.sampled_from([NO_CODEC, NO_CODEC, "zstd", "planes2-zstd"]))
        encoded = length if codec == NO_CODEC else draw(st.integers(1, length - 1))
        if locations and draw(st.booleans()):
            before = locations[-1]
            at = ChunkLocation(before.object_key, before.offset + before.encoded_length, length, encoded, codec)
        else:
            at = ChunkLocation(draw(st.sampled_from(KEYS)), draw(st.integers(0, 9000)), length, encoded, codec)
        locations.append(at)
    return recipe, locations


@given(placed())
def test_every_chunk_is_found_where_it_was_put(case: tuple[Recipe, list[ChunkLocation]]) -> None:
    recipe, locations = case
    placement = Placement.build(recipe, locations, 3, 300, describe)
    found = PlacedBlob(recipe, Placement.decode(placement.encode()))
    for index, at in enumerate(locations):
        assert found.locate(index) == at
    assert all(object_.url == f"/api/v1/objects/{object_.key}" for object_ in placement.objects)
    assert found.plain == all(at.codec == NO_CODEC for at in locations)


@given(placed(), st.data())
def test_segments_are_the_fewest_that_cover_a_range(
    case: tuple[Recipe, list[ChunkLocation]], data: st.DataObject
) -> None:
    recipe, locations = case
    found = PlacedBlob(recipe, Placement.build(recipe, locations, 1, 300, describe))
    first = data.draw(st.integers(0, len(recipe)))
    last = data.draw(st.integers(first, len(recipe)))
    segments = list(found.segments(range(first, last)))
    assert [s.first for s in segments] == [first + sum(t.count for t in segments[:i]) for i in range(len(segments))]
    assert sum(s.count for s in segments) == last - first
    for segment in segments:
        offset = segment.offset
        for at in locations[segment.first : segment.first + segment.count]:
            assert (segment.object.key, offset, segment.codec) == (at.object_key, at.offset, at.codec)
            offset += at.encoded_length
        assert offset == segment.offset + segment.length
    for one, two in pairwise(segments):
        assert (one.object.key, one.offset + one.length, one.codec) != (two.object.key, two.offset, two.codec)


def sample() -> tuple[Recipe, dict[str, Any]]:
    recipe = Recipe.build(BLOB, [(b"a" * 32, 10), (b"b" * 32, 20), (b"c" * 32, 30), (b"d" * 32, 40)])
    locations = [
        ChunkLocation(KEYS[0], 0, 10, 10),
        ChunkLocation(KEYS[0], 10, 20, 20),
        ChunkLocation(KEYS[1], 5, 30, 30),
        ChunkLocation(KEYS[1], 35, 40, 7, "planes2-zstd"),
    ]
    return recipe, json.loads(Placement.build(recipe, locations, 1, 300, describe).encode())


def check(recipe: Recipe, document: object) -> PlacedBlob:
    return PlacedBlob(recipe, Placement.decode(json.dumps(document).encode()))


def test_the_json_is_what_the_api_documents() -> None:
    recipe, document = sample()
    assert document == {
        "blob": BLOB,
        "version": 1,
        "lease_s": 300,
        "objects": [{"key": key, "url": f"/api/v1/objects/{key}", "size": SIZE} for key in KEYS[:2]],
        "runs": [
            {"first": 0, "count": 2, "object": 0, "offset": 0, "codec": "none", "key": None, "encoded": None},
            {"first": 2, "count": 1, "object": 1, "offset": 5, "codec": "none", "key": None, "encoded": None},
            {"first": 3, "count": 1, "object": 1, "offset": 35, "codec": "planes2-zstd", "key": None, "encoded": [7]},
        ],
        "format": 1,
    }
    del document["format"]
    document["later"] = {"unknown": "fields are ignored"}
    assert check(recipe, document).locate(2) == ChunkLocation(KEYS[1], 5, 30, 30)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("blob",), "0" * 64, "was told about"),
        (("format",), 2, "format 2 is newer"),
        (("version",), 0, "does not decode"),
        (("lease_s",), -1, "does not decode"),
        (("objects",), [], "object number 0 of 0"),
        (("objects", 0, "key"), "../etc/passwd", "not an object key"),
        (("objects", 0, "key"), "public/.staging/x", "not an object key"),
        (("objects", 0, "url"), "file:///etc/passwd", "not an address"),
        (("objects", 0, "url"), "/a\r\nHost: b", "not an address"),
        (("objects", 0, "url"), "", "not an address"),
        (("objects", 0, "size"), 29, "leaves its object of 29 bytes"),
        (("objects", 0, "size"), 1 << 63, "has 9223372036854775808 bytes"),
        (("runs",), [], "0 chunks are placed"),
        (("runs", 0, "first"), 1, "from number 1 follows 0"),
        (("runs", 1, "first"), 1, "from number 1 follows 2"),
        (("runs", 0, "count"), 0, "a run of 0 chunks"),
        (("runs", 0, "count"), -1, "a run of -1 chunks"),
        (("runs", 0, "count"), 5, "a run of 5 chunks"),
        (("runs", 0, "object"), 2, "object number 2 of 2"),
        (("runs", 0, "object"), -1, "object number -1 of 2"),
        (("runs", 0, "offset"), -1, "at -1 leaves"),
        (("runs", 0, "offset"), SIZE - 29, "leaves its object"),
        (("runs", 0, "offset"), "0", "does not decode"),
        (("runs", 0, "codec"), "zstd", "no encoded lengths"),
        (("runs", 0, "key"), "k1", "upgrade"),
        (("runs", 0, "encoded"), [10, 20], "2 encoded lengths"),
        (("runs", 2, "codec"), "brotli", "upgrade"),
        (("runs", 2, "codec"), NO_CODEC, "1 encoded lengths"),
        (("runs", 2, "encoded"), [], "0 encoded lengths"),
        (("runs", 2, "encoded"), [1, 1], "2 encoded lengths"),
        (("runs", 2, "encoded"), [0], "can't be stored in 0"),
        (("runs", 2, "encoded"), [-1], "can't be stored in -1"),
        (("runs", 2, "encoded"), [40], "can't be stored in 40"),
        (("runs", 2, "encoded"), [1 << 70], "can't be stored in"),
        (("runs", 2, "offset"), SIZE - 6, "leaves its object"),
    ],
)
def test_a_wrong_placement_is_refused(where: tuple[str | int, ...], value: object, message: str) -> None:
    recipe, document = sample()
    check(recipe, document)
    target: Any = document
    for step in where[:-1]:
        target = target[step]
    target[where[-1]] = value
    with pytest.raises(IntegrityError, match=message):
        check(recipe, document)


@given(
    st.binary(max_size=100)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        Placement.decode(data)


@given(st.data())
def test_a_mutated_placement_is_refused_or_places_every_chunk_in_bounds(data: st.DataObject) -> None:
    recipe, document = sample()
    encoded = mutate(data, json.dumps(document).encode())
    try:
        found = PlacedBlob(recipe, Placement.decode(encoded))
    except IntegrityError:
        return
    for index in range(len(recipe)):
        at = found.locate(index)
        assert at.offset >= 0
        assert at.offset + at.encoded_length <= min(o.size for o in found.placement.objects if o.key == at.object_key)


def test_a_deeply_nested_answer_is_refused() -> None:
    with pytest.raises(IntegrityError):
        Placement.decode(b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
