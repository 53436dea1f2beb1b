"""Marks in a prompt: what it begins with, at several lengths, each as a number.

Two prompts that have a mark in common are the same up to there. Marks stand at the end of each message (the next turn
of a conversation begins with all of this one; a system prompt is shared by those who ask under it) and at 1, 2, 4, ...
KiB, for texts that share their beginning in one message. They are made of the bytes as the client wrote them: a client
that writes the same text in another way has it computed once more, and nothing is decoded.

Numbers are those of this process alone (``hash`` is salted); nobody else needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec import Raw

from router.relay.said import Fields

Mark = tuple[int, int]
"""The number, and the bytes up to there."""

BYTES: Final = 256 << 10
"""So much of a prompt is looked at."""
MESSAGES: Final = 64
"""So many messages are, from the first."""
FIRST: Final = 1 << 10
NONE: Final = (b"", b"null")


def marks(name: str, fields: Fields) -> list[Mark]:
    """The marks of a request's prompt under a model's or adapter's name, the shortest first; none without a prompt."""
    found: list[Mark] = []
    state, at, due = hash(name), 0, FIRST
    for piece in _pieces(fields):
        start = 0
        while at + len(piece) - start >= due:
            state = hash((state, hash(bytes(piece[start : start + due - at]))))
            start += due - at
            at = due
            found.append((state, at))
            due *= 2
        if start < len(piece):
            state = hash((state, hash(bytes(piece[start:]))))
            at += len(piece) - start
            found.append((state, at))
        if at >= BYTES:
            break
    return found


def _pieces(fields: Fields) -> Iterator[memoryview]:
    """The parts of the prompt, in order; each ends at a mark."""
    for raw in (fields.system, fields.instructions):
        if _given(raw):
            yield memoryview(raw)[:BYTES]
    for message in (fields.messages or ())[:MESSAGES]:
        yield memoryview(message.role.encode() + b"\n" + bytes(memoryview(message.content)[:BYTES]))
    for raw in (fields.prompt, fields.token_ids, fields.input):
        if _given(raw):
            yield memoryview(raw)[:BYTES]


def _given(raw: Raw) -> bool:
    return bytes(memoryview(raw)[:4]) not in NONE
