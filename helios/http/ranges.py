"""The Range header of RFC 9110, section 14, for one range of bytes."""

from __future__ import annotations

import re

_SPEC = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*\Z", re.IGNORECASE | re.ASCII)
_DIGITS = 19
"""Longest number taken: no file has more bytes, and int() of a huge text is slow."""


class RangeError(ValueError):
    """The range is well-formed but lies outside the content: answer 416."""


def parse_range(header: str | None, size: int) -> range | None:
    """The bytes that a Range header asks for of ``size`` bytes, as ``range(start, stop)``; None: all of them.

    ``bytes=a-b``, ``bytes=a-`` and ``bytes=-n`` are understood. Anything else, several ranges included, is ignored, as
    the RFC allows and servers do. Raises RangeError for a range that starts behind the content, or for ``bytes=-0``.
    """
    match = _SPEC.match(header.strip()) if header else None
    if match is None:
        return None
    first, last = match.groups()
    if max(len(first), len(last)) > _DIGITS or not (first or last):
        return None
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None  # not a valid range at all
    if start >= stop:
        raise RangeError(f"no byte of {header!r} lies inside {size} bytes")
    return range(start, stop)
