"""Answers of which something is replaced on their way: the model's name (``renaming``), tokens that were cached.

``Rewriting`` stands between a worker's connection and whoever takes the answer, where something is to be replaced, so
other answers cost nothing more. It takes chunks apart, has a ``Text`` replace what is to be, and puts what it has into
chunks of its own, or sets Content-Length anew. What is no JSON, and no stream of events, goes on as it came, and so do
errors, compressed answers, and those whose headers bind them to their bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final, Protocol

from router.relay.ending import chunked
from router.relay.framing import LAST_CHUNK, Head, Payload
from router.relay.upstream import Taker

_BOUND: Final = (b"content-encoding:", b"content-digest:", b"repr-digest:", b"digest:", b"content-md5:")
"""Headers that bind an answer to its bytes."""


class Text(Protocol):
    """Replaces something in what it is fed."""

    @property
    def over(self) -> bool:
        """Whether ``grown`` is decided."""
        ...

    @property
    def grown(self) -> int:
        """Bytes that the text has more for it."""
        ...

    def feed(self, data: bytes) -> bytes:
        """The next bytes; returns those that go on now."""
        ...

    def end(self) -> bytes:
        """That was all; returns what is still here."""
        ...


class Rewriting:
    """Takes an answer and hands it on. ``document`` and ``events``: make what replaces in JSON, and in a stream."""

    __slots__ = ("_document", "_events", "_head", "_payload", "_text", "_to")

    def __init__(self, to: Taker, document: Callable[[], Text], events: Callable[[], Text]) -> None:
        self._to, self._document, self._events = to, document, events
        self._text: Text | None = None
        """None: the answer goes on as it comes."""
        self._payload: Payload | None = None
        self._head: Head | None = None
        """Held back while Content-Length is not known."""

    def came(self, head: Head | None, piece: bytes, ended: bool) -> None:
        if head is not None:
            self._text = self._text_of(head)
            self._payload = Payload() if self._text is not None and chunked(head) else None
            self._head = head
        text = self._text
        if text is None:
            self._to.came(head, piece, ended)
            return
        out = text.feed(piece if self._payload is None else self._payload.of(piece))
        if ended:
            out += text.end()
        elif not text.over or (not out and self._head is None):
            return
        head, self._head = self._head, None
        if head is not None and head.length:
            _resize(head, text.grown)
        if self._payload is not None:
            out = (b"%x\r\n%b\r\n" % (len(out), out) if out else b"") + (LAST_CHUNK if ended else b"")
        self._to.came(head, out, ended)

    def malformed(self, reason: str) -> None:
        self._to.malformed(reason)

    def broke(self, reason: str, stale: bool) -> None:
        self._to.broke(reason, stale)

    def _text_of(self, head: Head) -> Text | None:
        """What replaces something in an answer; None where nothing can."""
        if head.status != HTTPStatus.OK:
            return None
        if head.events:
            return self._events()
        lines = [line.lower() for line in head.lines]
        json = any(line.startswith(b"content-type: application/json") for line in lines)
        bound = any(line.startswith(_BOUND) for line in lines)
        return self._document() if json and not bound else None


def _resize(head: Head, grown: int) -> None:
    """The answer has so many bytes more."""
    for index, line in enumerate(head.lines):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            head.lines[index] = b"%b: %d" % (name, int(value) + grown)
