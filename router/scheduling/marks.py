"""Marks in a prompt: what it begins with, at several lengths, each as a number.

Two prompts that have a mark in common are the same up to there. Marks stand at the end of each message (the next turn
of a conversation begins with all of this one; a system prompt is shared by those who ask under it) and at 1, 2, 4, ...
KiB, for texts that share their beginning in one message. They are made of the bytes as the client wrote them: a client
that writes the same text in another way has it computed once more, and nothing is decoded.

A mark is XXH3 of what is new since the one before it, seeded with that one: the same number in every process and every
router. It is no secret and no proof: who makes two prompts with one mark has his own requests placed worse.
"""

from __future__ import annotations

from typing import Final

from msgspec import Raw
from xxhash import xxh3_64_intdigest

from router.relay.said import NOT_SENT, Fields

Mark = tuple[int, int]
"""The number, and the bytes up to there."""

BYTES: Final = 256 << 10
"""So much of a prompt is looked at."""
MESSAGES: Final = 64
"""So many messages are, from the first."""
FIRST: Final = 1 << 10
NONE: Final = (b"", b"null")


class Marks:
    """Those of one prompt: ``found``, the shortest first; none without a prompt.

    ``own``: the number of the beginning that stays the same for as long as a conversation lasts, and that not all who
    ask under one system prompt have in common: up to the end of the first message by a user, but no further than
    ``FIRST``. 0: there is none."""

    __slots__ = ("_at", "_due", "_state", "found", "own")

    def __init__(self, name: str, fields: Fields) -> None:
        """``name``: the model's, or adapter's."""
        self.found: list[Mark] = []
        self.own = 0
        self._state, self._at, self._due = _digest(name.encode(), 0), 0, FIRST
        self._add_raw(fields.system)
        self._add_raw(fields.instructions)
        for message in (fields.messages or ())[:MESSAGES]:
            content = message.content
            self._add(message.role.encode() + b"\n" + (b"" if content is NOT_SENT else _cut(content)))
            if message.role == "user" and not self.own:
                self.own = self._state
            if self._at >= BYTES:
                return
        self._add_raw(fields.prompt)
        self._add_raw(fields.token_ids)
        self._add_raw(fields.input)
        if not self.own and self.found:
            self.own = self._state

    def _add_raw(self, raw: Raw) -> None:
        if raw is not NOT_SENT and self._at < BYTES:
            piece = _cut(raw)
            if piece not in NONE:
                self._add(piece)

    def _add(self, piece: bytes) -> None:
        """The next part of the prompt, which ends at a mark."""
        start, size = 0, len(piece)
        while self._at + size - start >= self._due:
            stop = start + self._due - self._at
            self._mark(piece[start:stop])
            start = stop
            self._due *= 2
            if not self.own:
                self.own = self._state
        if start < size:
            self._mark(piece[start:] if start else piece)

    def _mark(self, piece: bytes) -> None:
        self._state = _digest(piece, self._state)
        self._at += len(piece)
        self.found.append((self._state, self._at))


def _digest(data: bytes, seed: int) -> int:
    """62 bits, above 0: small for CPython and for mypyc, and 0 is no mark (``homes``)."""
    return (xxh3_64_intdigest(data, seed) >> 2) or 1


def _cut(raw: Raw) -> bytes:
    data = bytes(raw)
    return data if len(data) <= BYTES else data[:BYTES]
