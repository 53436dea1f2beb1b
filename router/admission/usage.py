"""How many tokens an answer used, read from its own ``usage`` at its end; the bytes themselves go on untouched.

Only the last bytes are kept, as they came: nothing is looked at before the answer is over. A whole answer that is
still here is parsed as the JSON it is. In a stream the last events are looked through, from the end, for one with
usage: the client has to have asked for it (``stream_options.include_usage``; ``/v1/responses`` and ``/v1/messages``
send it always). Of a long answer the last ``"usage": {`` counts: inside a JSON string the quotes would be escaped.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Final

import msgspec

from router.admission.usage_said import ANSWERS, USAGES, Usage

KEPT: Final = 8192
"""Bytes at the end that are kept, and the rest of the piece they begin in."""
_SEAM: Final = re.compile(rb"\r\n[0-9A-Fa-f]{1,8}(?:;[^\r\n]*)?\r\n")
"""Between two chunks. JSON has no raw line ends inside strings, and no line of an event is like this."""
_FIRST_SEAM: Final = re.compile(rb"\A[0-9A-Fa-f]{1,8}\r\n")
_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{')


class Meter:
    """The end of one answer."""

    __slots__ = ("_first", "_pieces", "_size", "_whole")

    def __init__(self) -> None:
        self._first = b""
        self._pieces: deque[bytes] | None = None
        self._size = 0
        self._whole = True

    def feed(self, piece: bytes) -> None:
        """The next bytes, with the framing of their chunks."""
        pieces = self._pieces
        if pieces is None:
            if not self._size:  # most answers that are no stream come in one piece
                self._first, self._size = piece, len(piece)
                return
            pieces = self._pieces = deque((self._first,))
        pieces.append(piece)
        self._size += len(piece)
        while self._size - len(pieces[0]) >= KEPT:
            self._size -= len(pieces.popleft())
            self._whole = False

    def tokens(self, chunked: bool, events: bool) -> int | None:
        """The tokens that the answer says it used, or None where it does not say."""
        found = self.usage(chunked, events)
        used = None if found is None else _tokens(found)
        return used if used is not None and used >= 0 else None

    def usage(self, chunked: bool, events: bool) -> Usage | None:
        """What the answer says it used. ``chunked``: its pieces have the framing of chunks; ``events``: a stream."""
        tail = self._first if self._pieces is None else b"".join(self._pieces)
        if chunked:
            if self._whole:
                tail = _FIRST_SEAM.sub(b"", tail)
            tail = _SEAM.sub(b"", tail)
        return _of_events(tail) if events else _of_document(tail) if self._whole else _of_end(tail)


def _tokens(usage: Usage) -> int | None:
    if usage.total_tokens is not None:
        return usage.total_tokens
    prompt = prompt_of(usage)
    return None if prompt is None else prompt + (output_of(usage) or 0)


def prompt_of(usage: Usage) -> int | None:
    """Tokens of the prompt, in whichever interface's words."""
    return usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens


def output_of(usage: Usage) -> int | None:
    """Tokens of the answer."""
    return usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens


def _of_document(document: bytes) -> Usage | None:
    try:
        return ANSWERS.decode(document).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _of_events(tail: bytes) -> Usage | None:
    if b'"usage"' not in tail:  # most streams: cheaper to know than to look for
        return None
    for line in reversed(tail.splitlines()):
        if line.startswith(b"data:") and b'"usage"' in line:
            try:
                answer = ANSWERS.decode(line[5:])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
            found = answer.usage or (answer.response.usage if answer.response is not None else None)
            if found is not None:
                return found
    # An event that is longer than what is kept: /v1/responses repeats its whole answer in the last one.
    return _of_end(tail)


def _of_end(tail: bytes) -> Usage | None:
    for match in list(_USAGE.finditer(tail))[:-4:-1]:
        begin = match.end() - 1
        end = _object_end(tail, begin)
        try:
            found = USAGES.decode(tail[begin:end])
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        if _tokens(found) is not None:
            return found
    return None


def _object_end(text: bytes, begin: int) -> int:
    """Where an object of numbers and objects, without strings that hold braces, ends."""
    depth = 0
    for index in range(begin, len(text)):
        if text[index] == 0x7B:
            depth += 1
        elif text[index] == 0x7D:
            depth -= 1
            if not depth:
                return index + 1
    return begin
