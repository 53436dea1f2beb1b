"""Sums beside whole blobs: their form, when they are made, and what a look at a file with them finds."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from helios.errors import IntegrityError
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.examine import Examination, load_sums
from heliosfs.tiers.sums import Sums, Tally
from tests.golden.make import example, recipe_of
from tests.support.damage import flip

GOLDEN = Path(__file__).parents[2] / "golden/v1"
CUTS = [1, 700, 4095, 4096, 4097, 100_000, 1 << 20]
DATA = random.Random(1).randbytes(sum(CUTS))
RECIPE = recipe_of(DATA, CUTS)
NAME = hashlib.sha256(DATA).hexdigest()


def sums_of(recipe: Recipe, data: bytes) -> Sums:
    tally = Tally(recipe)
    for index in range(len(recipe)):
        start, end = recipe.span(index)
        tally.note(index, memoryview(data)[start:end])
    return tally.sums()


def look(path: Path, sums: Sums | None, *, strong: bool = False) -> Examination:
    examination = Examination(str(path), NAME, sums, strong=strong)
    while examination.step():
        pass
    examination.close()
    return examination


def no_direct(patch: pytest.MonkeyPatch) -> None:
    """A filesystem without O_DIRECT."""
    real = os.open

    def opened(path: str, flags: int, *args: int, **options: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **options)

    patch.setattr(os, "open", opened)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    return path


def test_the_golden_file() -> None:
    """What was written once is read for ever, and what is written today is the same."""
    data = example()
    golden = (GOLDEN / "tensors.sums").read_bytes()
    recipe = Recipe.decode((GOLDEN / "tensors.recipe").read_bytes())
    sums = Sums.decode(golden, hashlib.sha256(data).hexdigest())
    assert sums.recipe == recipe
    spans = [recipe.span(index) for index in range(len(recipe))]
    assert sums.values == array("Q", [xxh3_64_intdigest(data[start:end]) for start, end in spans])
    assert sums_of(recipe, data).encode() == golden
    plain = Recipe.decode((GOLDEN / "plain.recipe").read_bytes())
    assert Sums.decode((GOLDEN / "plain-unknown.sums").read_bytes(), plain.blob) == Sums(plain)
    assert Sums(plain).encode() == (GOLDEN / "plain-unknown.sums").read_bytes()


@given(st.integers(0, len(Sums(RECIPE).encode()) + 56 - 1), st.integers(0, 7))
def test_any_flipped_bit_is_noticed(at: int, bit: int) -> None:
    data = bytearray(sums_of(RECIPE, DATA).encode())
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(IntegrityError):
        Sums.decode(bytes(data), NAME)


@given(st.integers(0, 500))
def test_a_torn_file_is_noticed(length: int) -> None:
    data = sums_of(RECIPE, DATA).encode()
    with pytest.raises(IntegrityError):
        Sums.decode(data[: min(length, len(data) - 1)], NAME)


def test_sums_of_another_blob_or_a_later_version_are_refused() -> None:
    with pytest.raises(IntegrityError, match="not of"):
        Sums.decode(sums_of(RECIPE, DATA).encode(), "0" * 64)
    later = bytearray(Sums(RECIPE).encode())
    later[4] = 2
    later[-8:] = xxh3_64_intdigest(bytes(later[:-8])).to_bytes(8, "little")
    with pytest.raises(IntegrityError, match="newer"):
        Sums.decode(bytes(later), NAME)


def test_a_tally_with_a_gap_has_no_sums() -> None:
    tally = Tally(RECIPE)
    for index in range(1, len(RECIPE)):
        tally.note(index, memoryview(DATA)[slice(*RECIPE.span(index))])
    assert tally.sums().values is None
    tally.note(0, memoryview(DATA)[:1])
    assert tally.sums() == sums_of(RECIPE, DATA)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("strong", [True, False])
def test_a_flipped_bit_in_any_chunk_is_found(
    file: Path, direct: bool, strong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        no_direct(monkeypatch)
    sums = sums_of(RECIPE, DATA)
    right = look(file, sums, strong=strong)
    assert (right.bad, right.fresh) == ([], None)
    for index in range(len(RECIPE)):
        start, end = RECIPE.span(index)
        for offset in {start, end - 1}:
            flip(file, offset)
            found = look(file, sums, strong=strong)
            assert found.bad == [index]
            assert f"chunk {index} of" in found.reason
            flip(file, offset)


def test_without_sums_the_recipe_and_without_that_the_name_decides_and_sums_are_made(file: Path) -> None:
    by_recipe = look(file, Sums(RECIPE))
    assert by_recipe.fresh == sums_of(RECIPE, DATA)
    by_name = look(file, None)
    assert by_name.bad == []
    assert by_name.fresh is not None
    assert by_name.fresh.recipe == recipe_of(DATA, [len(DATA)])
    assert look(file, by_name.fresh).fresh is None
    flip(file, 5)
    assert look(file, Sums(RECIPE)).bad == [1]
    assert look(file, None).reason == "it does not have its sha256"


def test_wrong_sums_of_right_bytes_are_made_anew(file: Path) -> None:
    wrong = sums_of(RECIPE, DATA)
    assert wrong.values is not None
    wrong.values[3] ^= 1
    found = look(file, wrong)
    assert found.bad == []
    assert found.fresh == sums_of(RECIPE, DATA)


def test_a_file_of_another_length_is_wrong(file: Path) -> None:
    os.truncate(file, len(DATA) - 1)
    assert "instead of" in look(file, sums_of(RECIPE, DATA)).reason


@pytest.mark.parametrize("direct", [True, False])
def test_looking_leaves_the_page_cache_as_it_was(file: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with file.open("rb") as opened:

        def cached() -> bool:
            try:
                return os.preadv(opened.fileno(), [bytearray(4096)], 64 << 10, os.RWF_NOWAIT) == 4096
            except BlockingIOError:
                return False

        def stays_out() -> bool:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            look(file, sums_of(RECIPE, DATA))
            return not cached()

        os.fsync(opened.fileno())
        if not direct:
            no_direct(monkeypatch)
        assert any(stays_out() for _ in range(5)), "once may be the kernel's doing: it keeps pages it has in hand"
        opened.read()
        look(file, sums_of(RECIPE, DATA))
        assert cached()


def test_sums_that_can_t_be_used_are_none(tmp_path: Path) -> None:
    assert load_sums(str(tmp_path / "missing"), NAME) is None
    (tmp_path / "torn").write_bytes(sums_of(RECIPE, DATA).encode()[:-3])
    assert load_sums(str(tmp_path / "torn"), NAME) is None
