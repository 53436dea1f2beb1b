"""The model's name in answers, put back to what the client asked for (``router.answer_model = "asked"``).

The name is the first own field ``model`` of a whole answer (JSON); in a stream, of each
event, where it may also stand in ``response`` (/v1/responses) or ``message`` (/v1/messages). Only as much is held back
as is needed to find it, at most ``MOST`` bytes of a document or line. What has none there goes on as it came, and so
does every other answer (``rewriting``).

What comes out does not depend on how the answer was cut into pieces: a line (or document) is looked at from its
beginning, and no further than ``MOST``.
"""

from __future__ import annotations

from typing import Final

import msgspec

from router.relay.model_name import MODEL, PLACES, is_own
from router.relay.rewriting import Rewriting
from router.relay.upstream import Taker

MOST: Final = 256 << 10
"""Bytes of a document, or of a line of a stream, in which the name is looked for."""
DATA: Final = b"data:"
INSIDE: Final = frozenset({"response", "message"})
_WORD: Final = b'"model"'


class Document:
    """One JSON document; or a line of a stream, if ``lead`` is what a line with one begins with.

    ``over``: nothing is held back any more. ``found``: how the text began, up to its name, once that is found, and
    ``instead``: how it goes on."""

    __slots__ = ("_at", "_held", "_inside", "_lead", "_name", "_places", "found", "instead", "over")

    def __init__(self, name: bytes, lead: bytes = b"", inside: frozenset[str] = frozenset()) -> None:
        """``name``: in JSON; ``inside``: objects in the document that may have it."""
        self._name, self._lead, self._inside = name, lead, inside
        self._held = bytearray()
        self._at, self._places = len(lead), 0
        self.found = self.instead = b""
        self.over = False

    @property
    def grown(self) -> int:
        return len(self.instead) - len(self.found)

    def feed(self, data: bytes) -> bytes:
        if self.over:
            return data
        self._held += data
        return self.end() if self._decided() else b""

    def end(self) -> bytes:
        if self.over:
            return b""
        self.over = True
        held, self._held = self._held, bytearray()
        return self.instead + held[len(self.found) :]

    def _decided(self) -> bool:
        """Look at what has come; whether it is clear now where the name is, or that there is none."""
        held, lead = self._held, self._lead
        if not held.startswith(lead):
            return not lead.startswith(held)
        while self._places < PLACES:
            match = MODEL.search(held, self._at, MOST)
            if match is None:
                # What may be the beginning of a place is looked at again with what follows.
                word = held.rfind(_WORD, self._at, MOST)
                self._at = word if word >= 0 else max(self._at, min(len(held), MOST) - len(_WORD) + 1)
                return len(held) >= MOST
            self._places, self._at = self._places + 1, match.end()
            if is_own(bytes(held[len(lead) : match.start()]), self._inside):
                begin, end = match.span(1)
                self.found, self.instead = bytes(held[:end]), bytes(held[:begin]) + self._name
                return True
        return True


class Events:
    """A stream of events, line by line."""

    __slots__ = ("_instead", "_known", "_line", "_name")

    over = True
    grown = 0

    def __init__(self, name: bytes) -> None:
        self._name = name
        self._line: Document | None = None
        """The line that has begun."""
        self._known = self._instead = b""
        """How the last line with a name began, and went on: the events of an answer mostly begin alike."""

    def feed(self, data: bytes) -> bytes:
        out, at = [], 0
        while at < len(data):
            end = data.find(b"\n", at) + 1
            out.append(self._part(data[at : end or len(data)], whole=end > 0))
            at = end or len(data)
        return b"".join(out)

    def end(self) -> bytes:
        line, self._line = self._line, None
        return b"" if line is None else line.end()

    def _part(self, data: bytes, *, whole: bool) -> bytes:
        """The next part of a line; ``whole``: the line ends with it."""
        line = self._line
        if line is None:
            known = self._known
            if known and data.startswith(known):
                data = self._instead + data[len(known) :]
                if not whole:
                    self._line = Document(self._name)
                    self._line.over = True  # the rest goes on as it comes
                return data
            line = self._line = Document(self._name, DATA, INSIDE)
        out = line.feed(data)
        if whole:
            out += line.end()
            self._line = None
        if line.found:
            self._known, self._instead = line.found, line.instead
        return out


def renamed(to: Taker, name: str) -> Rewriting:
    """Takes a worker's answer for a client that asked for ``name``, and hands it on."""
    encoded = msgspec.json.encode(name)
    return Rewriting(to, lambda: Document(encoded), lambda: Events(encoded))
