"""The tokens of a prompt that were cached, in answers of a worker that took its blocks from another.

To the worker that answers all of them were: it has the blocks. What the client is to read is what the other one had
cached before it computed the rest, so that number takes the place of the own one, where there is one or is room for
one: in ``usage``, by the names of the answer's API. vLLM says neither unless it is told to
(``--enable-prompt-tokens-details``): then nothing is replaced, and nothing comes here.

A whole answer is held until all of it is here, which it is at once. Of a stream a line is looked at that may have a
``usage`` other than null; all others go on as they come.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
from msgspec import Raw

from router.disaggregation.bodies import Document, document_of
from router.relay.rewriting import Rewriting
from router.relay.upstream import Taker

MOST: Final = 1 << 20
"""Longest document, or line of a stream, that is looked at, in bytes; a longer one goes on as it came."""
DATA: Final = b"data:"
_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{')
_DETAILS: Final = {
    "/v1/chat/completions": "prompt_tokens_details",
    "/v1/completions": "prompt_tokens_details",
    "/inference/v1/generate": "prompt_tokens_details",
    "/v1/responses": "input_tokens_details",
}
"""The object of ``usage`` in which the number stands, by route. In that of /v1/messages it stands itself, and is a part
of what the prompt has in all: ``input_tokens`` are the others."""
READ: Final = "cache_read_input_tokens"
_NULL: Final = Raw(b"null")
_INSIDE: Final = frozenset({"response", "message"})
"""Objects of an event that may have a ``usage`` (/v1/responses, /v1/messages)."""


def corrected(to: Taker, path: str, cached: int) -> Taker:
    """Takes a worker's answer to a route, and hands it on with ``cached`` tokens."""
    return Rewriting(to, lambda: _Document(path, cached), lambda: _Events(path, cached))


def replaced(document: bytes, path: str, cached: int) -> bytes:
    """A JSON object of an answer with that number; as it came where it has no usage."""
    try:
        fields = document_of(document)
        if _set(fields, path, cached):
            return msgspec.json.encode(fields)
        for name in fields.keys() & _INSIDE:
            inner = document_of(bytes(fields[name]))
            if _set(inner, path, cached):
                fields[name] = Raw(msgspec.json.encode(inner))
                return msgspec.json.encode(fields)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
        pass  # it is no object, or has others where objects, or numbers, should be
    return document


def _set(fields: Document, path: str, cached: int) -> bool:
    """Whether there is a place for the number, which it is put at."""
    if bytes(fields.get("usage", _NULL)) == b"null":
        return False
    usage = document_of(bytes(fields["usage"]))
    details = _DETAILS.get(path)
    if details is not None:
        inner = usage.get(details, _NULL)
        inside = {} if bytes(inner) == b"null" else document_of(bytes(inner))
        usage[details] = Raw(msgspec.json.encode(inside | {"cached_tokens": Raw(b"%d" % cached)}))
    elif READ in usage:
        others = int(bytes(usage.get("input_tokens", Raw(b"0")))) + int(bytes(usage[READ])) - cached
        usage |= {READ: Raw(b"%d" % cached), "input_tokens": Raw(b"%d" % max(0, others))}
    else:
        return False
    fields["usage"] = Raw(msgspec.json.encode(usage))
    return True


class _Document:
    """A whole answer."""

    __slots__ = ("_cached", "_held", "_path", "grown", "over")

    def __init__(self, path: str, cached: int) -> None:
        self._path, self._cached = path, cached
        self._held = bytearray()
        self.grown, self.over = 0, False

    def feed(self, data: bytes) -> bytes:
        if self.over:
            return data
        self._held += data
        if len(self._held) <= MOST:
            return b""
        self.over = True
        return self._taken()

    def end(self) -> bytes:
        if self.over:
            return b""
        self.over = True
        came = self._taken()
        out = replaced(came, self._path, self._cached)
        self.grown = len(out) - len(came)
        return out

    def _taken(self) -> bytes:
        held, self._held = bytes(self._held), bytearray()
        return held


class _Events:
    """A stream, line by line. A line is held until its end, but for one that can't have a usage."""

    __slots__ = ("_cached", "_line", "_passes", "_path")

    over = True
    grown = 0

    def __init__(self, path: str, cached: int) -> None:
        self._path, self._cached = path, cached
        self._line = bytearray()
        """What has come of the line that has begun."""
        self._passes = False
        """Whether the rest of that line goes on as it comes."""

    def feed(self, data: bytes) -> bytes:
        out, at = [], 0
        while at < len(data):
            end = data.find(b"\n", at) + 1
            part = data[at : end or len(data)]
            at = end or len(data)
            if self._passes:
                out.append(part)
                self._passes = not end
                continue
            self._line += part
            if end:
                out.append(self.end())
            elif len(self._line) > MOST or not (DATA.startswith(self._line[:5]) or self._line.startswith(DATA)):
                self._passes = True
                out.append(self._taken())
        return b"".join(out)

    def end(self) -> bytes:
        """The line that has begun, which was all of it."""
        line = self._taken()
        if len(line) > MOST or not line.startswith(DATA) or _USAGE.search(line) is None:
            return line
        document = line[len(DATA) :].strip()
        out = replaced(document, self._path, self._cached)
        return line if out is document else line.replace(document, out)

    def _taken(self) -> bytes:
        line, self._line = bytes(self._line), bytearray()
        return line
