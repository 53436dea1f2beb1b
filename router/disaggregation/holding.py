"""Answers of decode workers that do not count yet: held until the prompt's worker has succeeded, or until they show
whether the prompt was cached.

Both stand nearest to the connection, so what is behind them sees an answer as it would have come. What breaks goes on
at once: it failed, whatever is held of it.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final

import msgspec
from msgspec import Raw

from helios.decoding import json_decoder
from router.relay.ending import chunked
from router.relay.framing import Head, Payload
from router.relay.upstream import Taker

FINISH: Final = "cache_threshold"
"""The finish reason of an answer that was not made, since too little of its prompt was cached (vLLM RFC #24256)."""
DOCUMENT_MAX: Final = 1 << 20
STREAM_MAX: Final = 64 << 10
"""Longest beginning that is held to see it, in bytes: an answer of more is one."""


class _Holding:
    """What both share."""

    __slots__ = ("_dropped", "_kept", "_to", "open")

    def __init__(self, to: Taker) -> None:
        self._to = to
        self._kept: list[tuple[Head | None, bytes, bool]] = []
        self._dropped = False
        self.open = False
        """Whether it goes on."""

    def malformed(self, reason: str) -> None:
        self._to.malformed(reason)

    def broke(self, reason: str, stale: bool) -> None:
        self._to.broke(reason, stale)

    def drop(self) -> None:
        """Nobody wants it any more."""
        self._dropped, self._kept = True, []

    def _go_on(self) -> None:
        """What is held goes on, and what comes does."""
        self.open = True
        kept, self._kept = self._kept, []
        for one in kept:
            if self._dropped:  # who took the first ones has given the answer up
                break
            self._to.came(*one)


class Held(_Holding):
    """Holds an answer until it is released. ``holds`` is told of each piece, with the head, and has the connection read
    no more, so that the rest stays there; what is held is what had been read in one go."""

    __slots__ = ("_holds", "refused")

    def __init__(self, to: Taker, holds: Callable[[Head | None], None]) -> None:
        super().__init__(to)
        self._holds = holds
        self.refused = False
        """Whether it is an error."""

    def came(self, head: Head | None, piece: bytes, ended: bool) -> None:
        if self.open:
            self._to.came(head, piece, ended)
        else:
            self._kept.append((head, piece, ended))
            self.refused = self.refused or (head is not None and head.status >= HTTPStatus.BAD_REQUEST)
            self._holds(head)

    def release(self, through: Callable[[Taker], Taker]) -> None:
        """It counts. ``through``: puts something in between."""
        self._to = through(self._to)
        self._go_on()


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    text: str | None = None
    delta: dict[str, Raw] | None = None

    @property
    def begun(self) -> bool:
        """Whether something was generated."""
        said = self.delta or {}
        return bool(self.text) or any(
            name != "role" and bytes(value) not in (b'""', b"null", b"[]") for name, value in said.items()
        )


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []


_ANSWER: Final = json_decoder(_Answer)


class Probed(_Holding):
    """Holds an answer's beginning until that shows whether the prompt was cached.

    ``missed`` is called where it was not, and nothing goes on then; else ``had``, before anything does."""

    __slots__ = ("_had", "_head", "_missed", "_payload", "_seen", "_text")

    def __init__(self, to: Taker, missed: Callable[[], None], had: Callable[[], None]) -> None:
        super().__init__(to)
        self._missed, self._had = missed, had
        self._head: Head | None = None
        self._payload: Payload | None = None
        self._text = bytearray()
        self._seen = 0
        """Where the first line begins that was not looked at."""

    def came(self, head: Head | None, piece: bytes, ended: bool) -> None:
        if self.open:
            self._to.came(head, piece, ended)
            return
        if head is not None:
            self._head = head
            self._payload = Payload() if chunked(head) else None
        self._kept.append((head, piece, ended))
        self._text += piece if self._payload is None else self._payload.of(piece)
        verdict = self._verdict(ended)
        if verdict is None:
            return
        if verdict:
            self._had()
            self._go_on()
        else:
            self.drop()
            self._missed()

    def _verdict(self, ended: bool) -> bool | None:
        """Whether it is an answer; None: that can't be seen yet."""
        head = self._head
        if head is None or head.status != HTTPStatus.OK:
            return True
        if not head.events:
            if ended:
                return _finish(bytes(self._text)) != FINISH
            return True if len(self._text) > DOCUMENT_MAX else None
        while (end := self._text.find(b"\n", self._seen)) >= 0:
            line, self._seen = bytes(self._text[self._seen : end]).strip(), end + 1
            if line.startswith(b"data:") and (found := _event(line[5:].strip())) is not None:
                return found
        return True if ended or len(self._text) > STREAM_MAX else None


def _finish(document: bytes) -> str | None:
    try:
        choices = _ANSWER.decode(document).choices
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return choices[0].finish_reason if choices else None


def _event(data: bytes) -> bool | None:
    """Whether the event is one of an answer; None: it says nothing of that."""
    try:
        choices = _ANSWER.decode(data).choices
    except (msgspec.DecodeError, UnicodeDecodeError):
        return True  # an error, or the end
    if not choices:
        return None
    if choices[0].finish_reason is not None:
        return choices[0].finish_reason != FINISH
    return True if choices[0].begun else None
