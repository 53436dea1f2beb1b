"""The Range header (RFC 9110, section 14)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.http.ranges import RangeError, parse_range


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        (None, 10, None),
        ("", 10, None),
        ("bytes=0-0", 10, range(0, 1)),
        ("bytes=2-5", 10, range(2, 6)),
        ("bytes=5-", 10, range(5, 10)),
        ("bytes=0-99", 10, range(0, 10)),
        ("bytes=-3", 10, range(7, 10)),
        ("bytes=-99", 10, range(0, 10)),
        ("BYTES = 1 - 2", 10, range(1, 3)),
        ("bytes=5-2", 10, None),
        ("bytes=1-2,4-5", 10, None),
        ("bytes=-", 10, None),
        ("items=0-1", 10, None),
        ("bytes=a-b", 10, None),
        ("bytes=٣-", 10, None),
        ("bytes=" + "9" * 5000 + "-", 10, None),
    ],
)
def test_ranges(header: str | None, size: int, expected: range | None) -> None:
    assert parse_range(header, size) == expected


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=10-12", 10), ("bytes=-0", 10), ("bytes=0-", 0)]
)
def test_outside(header: str, size: int) -> None:
    with pytest.raises(RangeError):
        parse_range(header, size)


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_matches_slicing(size: int, first: int, last: int) -> None:
    content = bytes(range(size))
    try:
        span = parse_range(f"bytes={first}-{last}", size)
    except RangeError:
        assert not content[first : last + 1]
        return
    if span is None:
        assert last < first
    else:
        assert content[span.start : span.stop] == content[first : last + 1] != b""


@given(st.text(max_size=40))
def test_anything_is_a_range_none_or_refused(header: str) -> None:
    try:
        span = parse_range(header, 100)
    except RangeError:
        return
    assert span is None or (0 <= span.start < span.stop <= 100)
