"""Range and conditional requests (RFC 9110, sections 13 and 14), without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from helios.http.ranges import RangeError, parse_range


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

    If-None-Match wins over Range, and compares weakly; a Range counts only if its If-Range, strongly compared, holds.
    """
    known = {tag.strip().removeprefix("W/").strip('"') for tag in headers.get("if-none-match", "").split(",")}
    if etag in known or "*" in known:
        return Answer(304)
    condition = headers.get("if-range")
    wanted = headers.get("range") if condition is None or condition.strip() == f'"{etag}"' else None
    try:
        span = parse_range(wanted, size)
    except RangeError:
        return Answer(416)
    return Answer(200, 0, size) if span is None else Answer(206, span.start, span.stop)
