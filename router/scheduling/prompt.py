"""The beginning of a request's prompt, as a text that is the same for requests that can share a KV cache.

Only a beginning is looked at, so this costs the same for a prompt of a megabyte. It is counted in characters, not
bytes: a character of several bytes is in it or not, so that one text gives one beginning however its client wrote it
down.

Of a conversation what counts goes up to its first message by a user: that stays the same in every later turn. A
prompt of token ids gives its ids, four characters each. ``"user": "..."`` inside a prompt's text is text: nothing is
searched for in the bytes of a body.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec
from msgspec import Raw

from helios.decoding import from_json
from router.relay.said import MESSAGES, PARTS, Fields, Message

CHAR_MAX: Final = 12
"""Most bytes of one character in JSON: two escapes of six."""
TOKEN_MAX: Final = 12
"""Most bytes of one token id with its comma."""
CHARS_PER_TOKEN: Final = 4
PARTS_MAX: Final = 64 << 10
"""Longest list of content parts that is read as one, in bytes; of a longer (images) its bytes count."""
MESSAGES_MAX: Final = 256 << 10
"""The same for a list of messages that is not read with the body."""
_STRING: Final = re.compile(rb'[\s\[]*"((?:[^"\\]+|\\.)*)', re.DOTALL)


def beginning(fields: Fields, chars: int) -> str:
    """The first ``chars`` characters of the prompt; empty where there is none."""
    if fields.messages:
        return _conversation([_content(fields.system, chars)], fields.messages, chars)
    for raw in (fields.prompt, fields.token_ids):
        if text := _text(raw, chars):
            return text
    if _first(fields.input) == b"[":
        return _input(fields, chars)
    said = [_text(raw, chars) for raw in (fields.instructions, fields.input, fields.query)]
    return "\n".join(text for text in said if text)[:chars]


def _input(fields: Fields, chars: int) -> str:
    """A list: of messages on /v1/responses, of texts or token ids for embeddings."""
    raw, parts = fields.input, [_text(fields.instructions, chars)]
    if len(memoryview(raw)) <= MESSAGES_MAX:
        try:
            return _conversation(parts, MESSAGES.decode(raw), chars)
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
    return "\n".join([*filter(None, parts), _text(raw, chars)])[:chars]


def _conversation(parts: list[str], messages: Iterable[Message], chars: int) -> str:
    left = chars - sum(map(len, parts))
    for message in messages:
        if left <= 0:
            break
        text = f"{message.role}\n{_content(message.content, left)}"
        parts.append(text)
        left -= len(text)
        if message.role == "user":
            break
    return "\n".join(part for part in parts if part)[:chars]


def _content(raw: Raw, chars: int) -> str:
    if _first(raw) == b"[" and len(memoryview(raw)) <= PARTS_MAX:
        try:
            if text := "\n".join(part.text for part in PARTS.decode(raw))[:chars]:
                return text
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
    return _text(raw, chars)


def _text(raw: Raw, chars: int) -> str:
    """The beginning of a string, of the first string of a list, or of a list of token ids; else of the bytes."""
    view = memoryview(raw)
    if not view:
        return ""
    head = bytes(view[: (chars + 1) * CHAR_MAX])
    if head == b"null":
        return ""
    if head.startswith(b'"'):
        plain = head[1 : None if (end := head.find(b'"', 1)) < 0 else end]
        if b"\\" not in plain:  # the usual case, without a search
            return plain.decode("utf-8", "ignore")[:chars]
    if string := _STRING.match(head):
        return _unescaped(string[1])[:chars]
    if head.startswith(b"["):
        return _ids(head, chars // CHARS_PER_TOKEN, len(head) < len(view))
    return head.decode("latin-1")[:chars]


def _unescaped(piece: bytes) -> str:
    """The text of a JSON string's inside, which may have been cut in a character or an escape."""
    for cut in range(CHAR_MAX + 1):
        try:
            text: str = from_json(b'"%b"' % piece[: len(piece) - cut], str)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        return text
    return piece.decode("latin-1")


def _ids(head: bytes, count: int, cut: bool) -> str:
    """The first ids of the first list."""
    ids = head.translate(None, b" \t\r\n").lstrip(b"[").partition(b"]")
    found = ids[0].split(b",")
    if cut and not ids[1]:
        found.pop()  # perhaps only a part of it is here
    return ",".join(one.decode("latin-1") for one in found[:count])


def _first(raw: Raw) -> bytes:
    return bytes(memoryview(raw)[:1])
