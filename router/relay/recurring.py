"""Heads that come again: one that a parser took is known the next time, whole, by one regular expression.

A client sends the same head with each request, and a worker with each answer, but for some values. So a head that
llhttp has taken becomes a pattern in which the values of its lines and the query are free, but for those that say how
the message is framed, and everything else is exactly as it was, names, line ends and spaces included. What matches is,
but for these values, the head that llhttp took: so nothing passes that llhttp would not take, or would read in another
way. A free value is a run of digits where a length stands, and of visible ASCII characters and spaces elsewhere, so it
can't hold a line end. Spaces behind a value are a part of it, as they are to llhttp.

Patterns outlive connections, and ``re`` keeps some of its own accord. That is why values are free and not only those
that differ: a pattern holds no credential, and the clients of a kind have one together.

This takes the place of a call into Python for each header line, which is most of what a head costs.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

LENGTH: Final = b"content-length"
MOST: Final = 256
"""Patterns that are kept, of all connections together."""
LONGEST: Final = 4096
"""A head of more bytes is not looked at..."""
LINES: Final = 64
"""...nor one of more lines..."""
LITERAL: Final = 1024
"""...nor one in which more bytes are the same each time: so a pattern has some 20 KiB at the most."""
_LINE: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([ \t]*)([^\r\n]*)\Z")
_START: Final = re.compile(rb"[\x20-\x7e]+\Z")
_FREE: Final = rb"([!-~][ -~]{0,4095})"
_DIGITS: Final = rb"[0-9]{1,15}"
_QUERY: Final = rb"([!-\x22$-~]*)"
_VISIBLE: Final = re.compile(_FREE + rb"\Z")
_NUMBER: Final = re.compile(_DIGITS + rb"([ \t]*)\Z")
_ASKED: Final = re.compile(_QUERY + rb"\Z")

_known: dict[bytes, re.Pattern[bytes]] = {}


class Recurring:
    """``pattern`` matches bytes that begin with such a head; its groups are the query and the values of the header's
    lines, of which there are ``lines``. ``length``: the number of the group that says how long the body is;
    ``made``: whether the pattern had to be made, which costs up to a millisecond."""

    __slots__ = ("length", "lines", "made", "pattern")

    def __init__(self, pattern: re.Pattern[bytes], length: int, lines: int, made: bool) -> None:
        self.pattern, self.length, self.lines, self.made = pattern, length, lines, made

    def size(self, match: re.Match[bytes]) -> int:
        """Bytes of the body that a matched head announces."""
        return int(match[self.length])


def recurring(head: bytes, fixed: Collection[bytes], query: bytes = b"") -> Recurring | None:
    """The pattern of a head that a parser took, up to its empty line; ``fixed``: names, in lower case, whose values
    have to be the same; ``query``: the one of its target. None for a head that can't be told apart with certainty
    (without exactly one length, with an odd line), or for which a pattern would be large."""
    if len(head) > LONGEST or not head.endswith(b"\r\n\r\n"):
        return None
    start, *lines = head[:-4].split(b"\r\n")
    if len(lines) > LINES or not _START.match(start) or not _ASKED.match(query):
        return None
    before, asks, after = start.partition(b"?" + query) if query else (start, b"", b"")
    parts = [re.escape(before + asks[:1]) + (_QUERY if asks else b"()") + re.escape(after)]
    length, differs = 0, len(query)
    for number, line in enumerate(lines):
        taken = _LINE.match(line)
        if taken is None:
            return None
        name, before, value = taken.groups()
        lowered = name.lower()
        if lowered == LENGTH:
            digits = _NUMBER.match(value)
            if length or digits is None:
                return None
            length, group = number + 2, b"(" + _DIGITS + re.escape(digits[1]) + b")"
        elif lowered in fixed or not value:
            group = b"(" + re.escape(value) + b")"
        elif _VISIBLE.match(value):
            group = _FREE
            differs += len(value)
        else:
            return None
        parts.append(re.escape(name) + b":" + re.escape(before) + group)
    if not length or len(head) - differs > LITERAL:
        return None
    source = b"\\r\\n".join(parts) + b"\\r\\n\\r\\n"
    pattern = _known.get(source)
    made = pattern is None
    if pattern is None:
        if len(_known) >= MOST:
            _known.clear()
        pattern = _known[source] = re.compile(source)
    return Recurring(pattern, length, len(lines), made)
