"""Layouts: any range of a file can be put together from them, and any range of a xorb is made from the file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import IntegrityError
from registry.xet.layout import Layout, Xorb
from tests.support.xet_client import chunks_of, put_together


@dataclass
class Example:
    """A layout, the file that it is of, and its xorbs as they are served."""

    layout: Layout
    content: bytes
    served: list[bytes]

    def fetch(self, number: int, first: int, stop: int) -> bytes:
        xorb = self.layout.xorbs[number]
        return self.served[number][xorb.position(first) : xorb.position(stop)]


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Every chunk occurs in the file; some runs of chunks do so again."""
    lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)
    xorbs = draw(st.lists(lengths, min_size=1, max_size=4))
    data = [
        [hashlib.shake_256(b"%d %d" % (number, index)).digest(length) for index, length in enumerate(chunks)]
        for number, chunks in enumerate(xorbs)
    ]
    terms: list[tuple[int, int, int]] = []
    for number, chunks in enumerate(xorbs):
        cuts = sorted({0, len(chunks), *draw(st.lists(st.integers(0, len(chunks)), max_size=3))})
        for first, stop in pairwise(cuts):
            terms.append((number, first, stop))
            for _ in range(draw(st.integers(0, 1))):  # again, something of what is known by now
                number_again = draw(st.integers(0, number))
                known = len(xorbs[number_again]) if number_again < number else stop
                start = draw(st.integers(0, known - 1))
                terms.append((number_again, start, draw(st.integers(start + 1, known))))
    content = b"".join(b"".join(data[number][first:stop]) for number, first, stop in terms)
    digests = [hashlib.sha256(b"xorb %d" % number).digest() for number in range(len(xorbs))]
    layout = Layout(hashlib.sha256(content).hexdigest(), b"f" * 32, list(zip(digests, xorbs, strict=True)), terms)
    served = []
    for chunks_ in data:
        head = [len(chunk).to_bytes(3, "little") for chunk in chunks_]
        served.append(b"".join(b"\0" + h + b"\0" + h + c for h, c in zip(head, chunks_, strict=True)))
    return Example(layout, content, served)


@given(examples())
def test_a_record_says_it_all(example: Example) -> None:
    record = example.layout.encode()
    again = Layout.decode(record)
    assert again.encode() == record
    assert (again.blob, again.file, again.size) == (example.layout.blob, b"f" * 32, len(example.content))
    whole = again.reconstruct(0, again.size)
    assert put_together(whole, example.fetch, again.size) == example.content


@given(examples(), st.data())
def test_any_range_can_be_put_together(example: Example, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(example.content) - 1))
    stop = data.draw(st.integers(start + 1, len(example.content)))
    plan = example.layout.reconstruct(start, stop)
    assert put_together(plan, example.fetch, stop - start) == example.content[start:stop]
    # No chunk too many: the first and the last part each have a wanted byte in their first and last chunk.
    first, last = plan.parts[0], plan.parts[-1]
    assert plan.skip < len(chunks_of(example.fetch(first.xorb, first.first, first.first + 1))[0])
    total = sum(part.length for part in plan.parts) - plan.skip - (stop - start)
    assert 0 <= total < len(chunks_of(example.fetch(last.xorb, last.stop - 1, last.stop))[0])
    for ranges in plan.fetch.values():
        assert all(a[1] < b[0] for a, b in pairwise(ranges))


@given(examples(), st.data())
def test_any_range_of_a_xorb_is_heads_and_bytes_of_the_file(example: Example, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(example.served) - 1))
    xorb, served = example.layout.xorbs[number], example.served[number]
    assert xorb.position(len(xorb)) == len(served)
    start = data.draw(st.integers(0, len(served) - 1))
    stop = data.draw(st.integers(start + 1, len(served)))
    end = start
    for span in xorb.spans(start, stop):
        assert (span.start, span.stop > span.start) == (end, True)
        assert _render(xorb, span.start, span.stop, example.content, span.offset - span.data) == served[end : span.stop]
        low, high = span.offset, span.offset + span.count
        assert 0 <= low <= high <= len(example.content)
        assert low < len(example.content)
        end = span.stop
    assert end == stop


def _render(xorb: Xorb, start: int, stop: int, content: bytes, base: int) -> bytes:
    """The span's bytes, one by one, from the heads and ``content``, where data byte n is at ``base + n``."""
    out = bytearray()
    for position in range(start, stop):
        chunk = xorb.chunk_at(position)
        inside = position - xorb.position(chunk)
        out.append(xorb.head(chunk)[inside] if inside < 8 else content[base + xorb.before(chunk) + inside - 8])
    return bytes(out)


@given(examples(), st.data())
def test_every_byte_of_data_is_where_it_is_said_to_be(example: Example, data: st.DataObject) -> None:
    xorb = example.layout.xorbs[0]
    at = data.draw(st.integers(0, xorb.ends[-1] - 1))
    position = xorb.locate(at)
    chunk = xorb.chunk_at(position)
    if at == xorb.before(chunk):
        assert position == xorb.position(chunk)
    else:
        assert position == xorb.position(chunk) + 8 + at - xorb.before(chunk)


@given(examples(), st.data())
def test_a_damaged_record_is_refused_or_harmless(example: Example, data: st.DataObject) -> None:
    """Its digest is checked by whoever reads it from the store; even without, nothing but an IntegrityError happens."""
    record = bytearray(example.layout.encode())
    if data.draw(st.booleans()):
        del record[data.draw(st.integers(0, len(record) - 1)) :]
    else:
        record[data.draw(st.integers(0, len(record) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        layout = Layout.decode(bytes(record))
    except IntegrityError:
        return
    assert layout.size == len(example.content)
    for xorb in layout.xorbs:
        for span in xorb.spans(0, xorb.position(len(xorb))):
            assert 0 <= span.offset <= span.offset + span.count <= layout.size


@pytest.mark.parametrize(
    ("xorbs", "terms", "wrong"),
    [
        ([[5, 6]], [(0, 0, 1)], "not every chunk"),
        ([[5, 6]], [(0, 1, 2)], "not every chunk"),
        ([[5, 6]], [(0, 0, 3)], "which it has not"),
        ([[5, 6]], [(0, 1, 1), (0, 0, 2)], "which it has not"),
        ([[5, 6]], [(1, 0, 1)], "which it has not"),
        ([[5], [6]], [(0, 0, 1)], "not every chunk"),
        ([[]], [], "impossible"),
        ([[0]], [(0, 0, 1)], "impossible"),
        ([[(128 << 10) + 1]], [(0, 0, 1)], "impossible"),
        ([[1] * 8193], [(0, 0, 8193)], "impossible"),
    ],
)
def test_what_contradicts_itself_is_no_layout(
    xorbs: list[list[int]], terms: list[tuple[int, int, int]], wrong: str
) -> None:
    with pytest.raises(IntegrityError, match=wrong):
        Layout("a" * 64, b"f" * 32, [(b"x" * 32, lengths) for lengths in xorbs], terms)


def test_a_newer_record_is_refused() -> None:
    record = bytearray(Layout("a" * 64, b"f" * 32, [(b"x" * 32, [3])], [(0, 0, 1)]).encode())
    record[4] = 2
    with pytest.raises(IntegrityError, match="upgrade"):
        Layout.decode(bytes(record))
    with pytest.raises(IntegrityError, match="not a Xet layout"):
        Layout.decode(b"HRCP" + bytes(record[4:]))
