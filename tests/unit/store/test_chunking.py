"""Where files are cut: everything is covered, nothing is too long, and tensors that did not change share chunks."""

from __future__ import annotations

from itertools import accumulate, pairwise
from unittest.mock import patch

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from heliosfs.store.chunking import (
    EDGE,
    LARGE,
    SMALL_TENSOR,
    chunks_read_first,
    cut_plain,
    cut_tensors,
    growing,
)
from heliosfs.store.recipe import MAX_CHUNK, Recipe

MIB = 1 << 20
sizes = st.one_of(
    st.integers(0, 64),
    st.integers(SMALL_TENSOR - 2, SMALL_TENSOR + 2),
    st.integers(MAX_CHUNK - 2, MAX_CHUNK + 2),
    st.integers(0, 3 * MAX_CHUNK),
    st.sampled_from([MAX_CHUNK, 2 * MAX_CHUNK, 900_000]),
)
headers = st.one_of(st.integers(10, 100_000), st.sampled_from([MAX_CHUNK, MAX_CHUNK + 1, 3 * MAX_CHUNK + 7]))


def tensors(header_end: int, lengths: list[int]) -> list[tuple[int, int]]:
    out = []
    for length in lengths:
        out.append((header_end, header_end + length))
        header_end += length
    return out


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(lengths, initial=0)))


def without_edges(header_end: int, where: list[tuple[int, int]]) -> list[int]:
    """How a safetensors file is cut if its edges are like the rest of it."""
    with patch("heliosfs.store.chunking.LARGE", 1 << 63):
        return cut_tensors(header_end, where)


def check_edges(lengths: list[int], plain: list[int]) -> None:
    """The chunks are those without edges, but the first and the last in pieces that grow towards the middle."""
    if sum(plain) < LARGE:
        assert lengths == plain
    else:
        first, last = list(growing(plain[0])), list(growing(plain[-1]))
        if plain[0] < MAX_CHUNK:  # a header that is read whole
            first = [plain[0]]
        assert lengths == [*first, *plain[1:-1], *last[::-1]]
    recipe = Recipe.build("0" * 64, [(bytes(32), length) for length in lengths])
    assert sum(lengths[: chunks_read_first(recipe)]) == (plain[0] if plain else 0)


@given(st.one_of(st.integers(1, MAX_CHUNK), st.integers(1, 40).map(lambda n: n * EDGE)), st.integers(0, MAX_CHUNK - 1))
def test_what_a_reader_at_an_edge_waits_for_is_little_or_in_proportion(length: int, at: int) -> None:
    """Whoever wants ``at`` bytes from the edge and one more waits for less than twice that, or than twice the least."""
    pieces = list(growing(length))
    assert sum(pieces) == length
    assert all(piece >= EDGE for piece in pieces) or pieces == [length]
    assert pieces[0] < 2 * EDGE
    end = next(end for end in accumulate(pieces) if end > at % length)
    assert end <= max(2 * EDGE, 3 * (at % length))


def test_a_chunk_of_4_mib_at_an_edge() -> None:
    kib = 1024
    assert list(growing(MAX_CHUNK)) == [n * kib for n in (64, 64, 128, 256, 512, 1024, 2048)]


@given(st.integers(0, 20 * MAX_CHUNK))
def test_a_plain_file_is_cut_on_the_grid(size: int) -> None:
    lengths = cut_plain(size)
    assert sum(lengths) == size
    assert all(0 < length <= MAX_CHUNK for length in lengths)
    whole, rest = divmod(size, MAX_CHUNK)
    check_edges(lengths, [MAX_CHUNK] * whole + [rest] * (rest > 0))


@given(headers, st.lists(sizes, max_size=12))
def test_the_edges_of_a_large_safetensors_file_are_cut_finer(header_end: int, parts: list[int]) -> None:
    where = tensors(header_end, parts)
    lengths = cut_tensors(header_end, where)
    check_edges(lengths, without_edges(header_end, where))
    if header_end < MAX_CHUNK:
        assert lengths[0] == header_end


@given(headers, st.lists(sizes, max_size=12))
def test_a_safetensors_file_is_covered_and_its_large_tensors_start_chunks(header_end: int, parts: list[int]) -> None:
    where = tensors(header_end, parts)
    lengths = without_edges(header_end, where)
    assert sum(lengths) == header_end + sum(parts)
    assert all(0 < length <= MAX_CHUNK for length in lengths)
    cuts = {start for start, _ in spans(lengths)} | {sum(lengths)}
    assert header_end in cuts
    for tensor in where:
        if tensor[1] - tensor[0] >= SMALL_TENSOR:
            assert {tensor[0], tensor[1]} <= cuts
            inside = sorted(c for c in cuts if tensor[0] <= c <= tensor[1])
            assert all(b - a == MAX_CHUNK for a, b in pairwise(inside[:-1]))
        else:  # never cut inside, even though it may share its chunk
            assert not any(tensor[0] < cut < tensor[1] for cut in cuts)


@given(headers, headers, st.lists(sizes, min_size=1, max_size=12), st.data())
def test_a_changed_header_and_a_changed_tensor_leave_every_other_chunk(
    one: int, two: int, parts: list[int], data: st.DataObject
) -> None:
    """Chunks by content: (tensor, offset in it) of their bytes, so moved tensors keep their chunks. That holds for the
    chunks at a large file's end, too, as long as the file is a large one."""
    assume((one + sum(parts) < LARGE) == (two + sum(parts) < LARGE))
    changed = data.draw(st.integers(0, len(parts) - 1))

    def content(header_end: int, version: int) -> list[tuple[tuple[str, int, int], ...]]:
        where = tensors(header_end, parts)
        out = []
        for start, end in spans(cut_tensors(header_end, where)):
            parts_in = [(n, first, last) for n, (first, last) in enumerate(where) if first < end and start < last]
            names = [f"t{n}.{version if n == changed else 0}" for n, _, _ in parts_in]
            edges = [(max(start, first) - first, min(end, last) - first) for _, first, last in parts_in]
            out.append(tuple((name, *edge) for name, edge in zip(names, edges, strict=True)))
        return [chunk for chunk in out if chunk]  # without the header's

    before, after = content(one, 1), content(two, 2)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        touches = any(name.startswith(f"t{changed}.") for name, _, _ in old)
        assert (old == new) is not touches


def test_small_tensors_share_chunks() -> None:
    where = tensors(1000, [8192] * 1000)
    assert cut_tensors(1000, where) == [1000, *[512 * 8192] * 1, (1000 - 512) * 8192]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        ([0, 0], []),
        ([MAX_CHUNK], [MAX_CHUNK]),
        ([9 * MIB], [MAX_CHUNK, MAX_CHUNK, MIB]),
        ([100, 9 * MIB, 100, 100], [100, MAX_CHUNK, MAX_CHUNK, MIB, 200]),
        ([SMALL_TENSOR - 1, SMALL_TENSOR - 1, SMALL_TENSOR], [2 * SMALL_TENSOR - 2, SMALL_TENSOR]),
        ([MIB - 1] * 5, [4 * MIB - 4, MIB - 1]),
    ],
)
def test_examples(parts: list[int], expected: list[int]) -> None:
    assert cut_tensors(200, tensors(200, parts)) == [200, *expected]
