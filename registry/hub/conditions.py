"""Range and conditional requests (RFC 9110, sections 13 and 14), without I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_RANGE = re.compile(r"bytes\s*=\s*(?:(\d{1,19})\s*-\s*(\d{1,19})?|-\s*(\d{1,19}))\s*\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What to send of a file: status 200, 206, 304 or 416 and, for the first two, bytes ``start`` to ``stop``."""

    status: int
    start: int = 0
    stop: int = 0

    def headers(self, size: int) -> list[tuple[str, str]]:
        """Content-Range, where the status has one."""
        if self.status == 206:
            return [("content-range", f"bytes {self.start}-{self.stop - 1}/{size}")]
        return [("content-range", f"bytes */{size}")] if self.status == 416 else []


def decide(headers: Mapping[str, str], etag: str, size: int) -> Answer:
    """How to answer a GET or HEAD for a file with this entity tag (without quotes) and size in bytes.

    If-None-Match wins over Range; a Range under an If-Range that does not match, in another unit, with several parts
    or malformed is ignored, as the standard allows; one that starts behind the end gives 416.
    """
    if etag in _tags(headers.get("if-none-match", "")) or headers.get("if-none-match", "").strip() == "*":
        return Answer(304)
    whole = Answer(200, 0, size)
    found = _RANGE.match(headers.get("range", "").strip())
    condition = headers.get("if-range")
    if found is None or (condition is not None and condition.strip() != f'"{etag}"'):
        return whole
    first, last, suffix = (None if group is None else int(group) for group in found.groups())
    if suffix is not None:
        return Answer(206, max(0, size - suffix), size) if suffix and size else Answer(416)
    assert first is not None
    if last is not None and last < first:
        return whole
    return Answer(416) if first >= size else Answer(206, first, size if last is None else min(last + 1, size))


def _tags(text: str) -> set[str]:
    """The entity tags of a list, without W/ and quotes: If-None-Match compares weakly."""
    return {tag.strip().removeprefix("W/").strip('"') for tag in text.split(",") if tag.strip()}
