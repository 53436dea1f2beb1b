"""The journal of a partial blob: what it says survives, what is torn or foreign is never believed."""

from __future__ import annotations

import hashlib

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import IntegrityError
from heliosfs.store.recipe import Recipe
from heliosfs.tiers import bitmap


def recipe_of(count: int, name: str = "a") -> Recipe:
    return Recipe.build(name * 64, ((blake3(b"%d" % i).digest(), 1000 + i) for i in range(count)))


def journal(recipe: Recipe, batches: list[list[int]]) -> bytes:
    data = bitmap.start(recipe)
    seed = bitmap.replay(data, recipe.blob, recipe.size).seed
    for batch in batches:
        data += bitmap.entries(seed, len(data), batch)
    return data


batches = st.lists(st.lists(st.integers(0, 39), max_size=12), max_size=8)


@given(batches)
def test_what_was_recorded_is_read_back(written: list[list[int]]) -> None:
    recipe = recipe_of(40)
    data = journal(recipe, written)
    read = bitmap.replay(data, recipe.blob, recipe.size)
    assert {i for i, flag in enumerate(read.have) if flag} == {i for batch in written for i in batch}
    assert read.recipe == recipe
    assert read.end == len(data)


@given(batches, st.data())
def test_a_torn_end_only_loses_the_end(written: list[list[int]], draw: st.DataObject) -> None:
    recipe = recipe_of(40)
    data = journal(recipe, written)
    head = len(bitmap.start(recipe))
    cut = draw.draw(st.integers(head, len(data)))
    tail = draw.draw(st.sampled_from([b"", b"\0" * 40, data[head:]]))
    read = bitmap.replay(data[:cut] + tail, recipe.blob, recipe.size)
    whole = bitmap.replay(data[: head + (cut - head) // 12 * 12], recipe.blob, recipe.size)
    if cut == head and tail == data[head:]:
        return  # that is the journal itself again
    assert read.have == whole.have
    assert read.end == whole.end


@given(batches, st.data())
def test_a_flipped_bit_never_adds_a_chunk(written: list[list[int]], draw: st.DataObject) -> None:
    recipe = recipe_of(40)
    data = bytearray(journal(recipe, written))
    at = draw.draw(st.integers(0, len(data) * 8 - 1))
    data[at // 8] ^= 1 << at % 8
    truth = {i for batch in written for i in batch}
    try:
        read = bitmap.replay(bytes(data), recipe.blob, recipe.size)
    except IntegrityError:
        return
    assert {i for i, flag in enumerate(read.have) if flag} <= truth
    assert read.recipe == recipe


def test_entries_of_another_journal_are_not_believed() -> None:
    one, other = recipe_of(40), recipe_of(40, "b")
    foreign = journal(other, [[1, 2, 3]])[len(bitmap.start(other)) :]
    read = bitmap.replay(bitmap.start(one) + foreign, one.blob, one.size)
    assert not any(read.have)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "only 0 bytes"),
        (b"\0" * 200, "damaged head"),
        (bitmap.start(recipe_of(3))[:-1], "ends inside its recipe"),
        (bitmap.start(recipe_of(3, "b")), "is one of b"),
        (bitmap.start(recipe_of(4)), "is one of a"),
    ],
)
def test_a_journal_that_is_not_the_blobs_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        bitmap.replay(data, "a" * 64, recipe_of(3).size)


def test_the_format_stays_as_it_is() -> None:
    """Version 1, byte for byte: caches outlive upgrades."""
    recipe = recipe_of(5)
    data = journal(recipe, [[0, 1, 3], [4]])
    assert data[:8] == b"HMAP\x01\x00\x00\x00"
    assert len(data) == 48 + len(recipe.encode()) + 3 * 12
    assert hashlib.sha256(data).hexdigest() == ("f8fd8782c74f42e6deef9f2f6e41858ffd3a0def580332e45c004fc86d28e7aa")
