"""Recipes: what is encoded comes back, anything else is refused, and offsets find their chunk."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import IntegrityError
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from tests.support.mutation import mutate

BLOB = hashlib.sha256(b"blob").hexdigest()
chunk_lists = st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.integers(1, MAX_CHUNK)), max_size=20)


@given(chunk_lists)
def test_a_recipe_survives_the_round_trip(chunks: list[tuple[bytes, int]]) -> None:
    recipe = Recipe.build(BLOB, chunks)
    again = Recipe.decode(recipe.encode(), recipe.digest)
    assert again == recipe
    assert list(again.chunks()) == chunks
    assert again.size == sum(length for _, length in chunks)


@given(chunk_lists, st.data())
def test_a_mutated_recipe_is_refused_or_is_another_valid_one(
    chunks: list[tuple[bytes, int]], data: st.DataObject
) -> None:
    record = mutate(data, Recipe.build(BLOB, chunks).encode())
    try:
        recipe = Recipe.decode(record)
    except IntegrityError:
        return
    assert recipe.encode() == record


@given(chunk_lists, st.data())
def test_windows_hold_every_chunk_once_and_as_many_as_fit(chunks: list[tuple[bytes, int]], data: st.DataObject) -> None:
    recipe = Recipe.build(BLOB, chunks)
    first = data.draw(st.integers(0, len(chunks)))
    wanted = range(first, data.draw(st.integers(first, len(chunks))))
    windows = list(recipe.windows(wanted))
    assert [index for window in windows for index in window] == list(wanted)
    for window in windows:
        size = sum(chunks[index][1] for index in window)
        assert 0 < size <= MAX_CHUNK
        assert window.stop == wanted.stop or size + chunks[window.stop][1] > MAX_CHUNK


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_canonical(data: bytes) -> None:
    try:
        recipe = Recipe.decode(data)
    except IntegrityError:
        return
    assert recipe.encode() == data


def test_the_digest_is_checked() -> None:
    recipe = Recipe.build(BLOB, [(b"a" * 32, 5)])
    other = Recipe.build(BLOB, [(b"b" * 32, 5)])
    with pytest.raises(IntegrityError, match="does not match its digest"):
        Recipe.decode(other.encode(), recipe.digest)


def test_a_newer_version_asks_for_an_upgrade() -> None:
    record = bytearray(Recipe.build(BLOB, []).encode())
    record[4] = 2
    with pytest.raises(IntegrityError, match=r"version 2 .* upgrade"):
        Recipe.decode(bytes(record))


@pytest.mark.parametrize("length", [0, MAX_CHUNK + 1])
def test_no_chunk_is_empty_or_too_long(length: int) -> None:
    with pytest.raises(IntegrityError, match=f"a chunk of {length} bytes"):
        Recipe.build(BLOB, [(b"a" * 32, length)])


@pytest.mark.parametrize(
    ("at", "form", "value", "why"),
    [
        (
            40,
            "<Q",
            29,
            "says 29 bytes but its chunks hold 30",
        ),
        (40, "<Q", 31, "says 31 bytes but its chunks hold 30"),
        (40, "<Q", (1 << 64) - 1, "says 18446744073709551615 bytes"),
        (48, "<I", 1, "says 1 chunks"),
        (48, "<I", 3, "says 3 chunks"),
        (48, "<I", (1 << 32) - 1, "says 4294967295 chunks"),
        (84, "<I", 0, "a chunk of 0 bytes"),
        (84, "<I", 9, "says 30 bytes but its chunks hold 29"),
        (84, "<I", (1 << 32) - 1, "a chunk of 4294967295 bytes"),
        (6, "<H", 1, "upgrade"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(at: int, form: str, value: int, why: str) -> None:
    """By its form it has no gaps and no overlaps: what it can lie about are lengths, their number and their sum."""
    record = bytearray(Recipe.build(BLOB, [(b"a" * 32, 10), (b"b" * 32, 20)]).encode())
    struct.pack_into(form, record, at, value)
    with pytest.raises(IntegrityError, match=why):
        Recipe.decode(bytes(record))


@given(st.lists(st.integers(1, 7), max_size=12), st.integers(0, 90), st.integers(0, 90))
def test_covering_names_exactly_the_chunks_of_a_range(lengths: list[int], offset: int, count: int) -> None:
    recipe = Recipe.build(BLOB, [(bytes([i]) * 32, length) for i, length in enumerate(lengths)])
    owner = [i for i, length in enumerate(lengths) for _ in range(length)]
    touched = sorted(set(owner[offset : offset + count]))
    assert list(recipe.covering(offset, count)) == touched
    for index in touched:
        start, end = recipe.span(index)
        assert owner[start] == owner[end - 1] == index
        assert recipe.locate(start) == recipe.locate(end - 1) == index
