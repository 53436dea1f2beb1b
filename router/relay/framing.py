"""The framing of a worker's answers, without I/O: bytes in, bytes for the client out, and where the answer ends.

The parser is httptools (llhttp, in C, in its strict mode). It is asked for headers and for the end only, so a body
costs no call a piece: what came is what goes on, chunk sizes and all (``Mode.VERBATIM``). Two cases differ: an answer
that ends with its connection is put into chunks, so that the client can tell its end from a break (``Mode.CHUNKED``);
for a client of HTTP/1.0 chunks are taken apart (``Mode.PLAIN``) and the end of the connection ends the answer.

An answer of a known length whose head is like one before (``recurring``) goes past the parser: its body is counted.

What a worker may not do is ``BadAnswer``: bytes that are no HTTP, two lengths that contradict each other (RFC 9112,
6.3), more bytes than it announced, an upgrade nobody asked for, a head of more than ``MAX_HEAD`` bytes.
"""

from __future__ import annotations

import http
import re
from enum import Enum
from typing import Final

import httptools

from router.relay.recurring import Recurring, recurring

MAX_HEAD: Final = 64 << 10
"""Most bytes of an answer's head."""
END: Final = b"\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"

_HOP: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"te", b"trailer", b"upgrade",
        b"transfer-encoding",
    }
)  # fmt: skip
_READ: Final = frozenset({b"content-length", b"content-type", b"content-encoding", b"x-request-id"})
_FIXED: Final = _HOP | {b"content-type", b"content-encoding"}
"""Headers that have the same values in answers whose heads are alike."""
_NO_BODY: Final = frozenset({http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED})
STATUS_LINES: Final = {
    status: f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else ''}\r\n".encode()
    for status in range(100, 600)
}


class BadAnswer(Exception):
    """What came is no answer in HTTP; the text says why."""


class Mode(Enum):
    """How a body goes on."""

    VERBATIM = "verbatim"
    CHUNKED = "chunked"
    PLAIN = "plain"


class Head:
    """An answer's head: what decides how it goes on. ``lines``: the headers that pass, each without its line end."""

    __slots__ = ("chunked", "events", "identified", "keep_alive", "length", "lines", "mode", "status")

    def __init__(self) -> None:
        self.status = 0
        self.lines: list[bytes] = []
        self.length = False
        """Whether the length is announced."""
        self.chunked = False
        self.events = False
        """Whether it is a stream of server-sent events, not compressed."""
        self.identified = False
        """Whether it has an X-Request-Id."""
        self.keep_alive = False
        """Whether the worker takes another request on this connection."""
        self.mode = Mode.VERBATIM

    def encode(self, request_id: bytes, keep_alive: bool) -> bytes:
        """The head that the client gets; without ``keep_alive`` its connection ends with the answer."""
        lines = self.lines
        if not self.identified:
            lines.append(b"x-request-id: " + request_id)
        if (self.chunked and self.mode is Mode.VERBATIM) or self.mode is Mode.CHUNKED:
            lines.append(b"transfer-encoding: chunked")
        if not keep_alive:
            lines.append(b"connection: close")
        return STATUS_LINES[self.status] + b"\r\n".join(lines) + END


class _Known:
    """Answers whose heads are alike."""

    __slots__ = ("_identified", "_passed", "_status", "like")

    def __init__(self, like: Recurring, raw: bytes, head: Head) -> None:
        """``raw``: the head as it came; ``head``: what was understood of it."""
        self.like = like
        self._status, self._identified = head.status, head.identified
        names = [line.partition(b":")[0] for line in raw[: -len(END)].split(b"\r\n")[1:]]
        self._passed = [(name + b": ", group) for group, name in enumerate(names, 2) if name.lower() not in _HOP]

    def head(self, match: re.Match[bytes]) -> Head:
        head = Head()
        head.status, head.identified, head.length, head.keep_alive = self._status, self._identified, True, True
        head.lines = [name + match[group] for name, group in self._passed]
        return head


class Framing:
    """The answers on one connection to a worker, one after the other; ``begin`` before each.

    ``head`` is None until an answer's head is whole; ``ended`` says that nothing of it is missing.
    """

    __slots__ = (
        "_buffer", "_compressed", "_counted", "_excess", "_http11", "_kind", "_known", "_left", "_named",
        "_parser", "_payload", "_seen", "_strange", "_tail", "between_chunks", "ended", "head",
    )  # fmt: skip

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.head: Head | None = None
        self.ended = True
        self.between_chunks = True
        """Whether an event may be put in here: no chunk is open."""
        self._seen: Head | None = None
        self._payload: Payload | None = None
        self._buffer, self._excess, self._http11 = b"", False, True
        self._left, self._tail = 0, b""
        self._known: _Known | None = None
        self._counted = False
        """Whether the answer goes past the parser."""

    def begin(self, http11: bool) -> None:
        """The next bytes are an answer for a client of HTTP/1.1, or of 1.0."""
        self.head = self._seen = self._payload = None
        self.ended, self.between_chunks, self._buffer, self._tail, self._http11 = False, True, b"", b"", http11
        self._counted = False

    @property
    def fresh(self) -> bool:
        """Whether no byte of the answer is here."""
        return self.head is None and not self._buffer

    def feed(self, data: bytes) -> bytes:
        """Take bytes; returns those of the body that go on now. Raises BadAnswer."""
        if self.ended:
            raise BadAnswer("it sent more than its answer")
        if self._counted:
            return self._count(data)
        known = self._known
        if known is not None and self.head is None and not self._buffer and self._seen is None:
            match = known.like.pattern.match(data)
            if match is not None and match.end() <= MAX_HEAD:
                self.head, self._left, self._counted = known.head(match), known.like.size(match), True
                return self._count(data[match.end() :])
        try:
            if self.head is None:
                data = self._take_head(data)
                if not data:
                    return b""
            return self._take_body(data)
        except httptools.HttpParserUpgrade:
            raise BadAnswer("it changes the protocol") from None
        except httptools.HttpParserError as error:
            raise BadAnswer(str(error)) from None

    def end_of_input(self) -> bytes:
        """The worker closed its side; returns what is still to be sent. Raises BadAnswer when the answer is cut."""
        head = self.head
        if head is None or head.length or head.chunked:
            raise BadAnswer("its connection ended inside the answer")
        self.ended = True
        return LAST_CHUNK if head.mode is Mode.CHUNKED else b""

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left <= 0:
            if self._left < 0:
                raise BadAnswer("it sent more than its answer")
            self.ended = True
        return data

    def _take_body(self, data: bytes) -> bytes:
        head = self.head
        assert head is not None
        if self.ended:
            raise BadAnswer("it sent more than its answer")
        if not (head.length or head.chunked):
            return b"%x\r\n%b\r\n" % (len(data), data) if head.mode is Mode.CHUNKED else data
        self._parser.feed_data(data)
        if head.chunked:
            self._tail = data[-5:] if len(data) > 4 else (self._tail + data)[-5:]
            excess = self._excess or self._ends_late()
        else:
            self._left -= len(data)
            excess = self._left < 0
        if excess:
            raise BadAnswer("it sent more than its answer")
        return data if self._payload is None else self._payload.of(data)

    def _ends_late(self) -> bool:
        """Whether line ends follow the one that ended the chunks: the parser skips them, a client would not."""
        return self.ended and (self._tail[1:] != END or self._tail[:1] in b"\r\n")

    def _take_head(self, data: bytes) -> bytes:
        """Complete the head; returns what follows it."""
        while True:
            known = len(self._buffer)
            buffer = self._buffer + data if known else data
            end = buffer.find(END, max(0, known - 3))
            if end < 0:
                self._parser.feed_data(data)
                if len(buffer) > MAX_HEAD:
                    raise BadAnswer(f"its head has more than {MAX_HEAD} bytes")
                self._buffer = buffer
                return b""
            end += len(END)
            self._parser.feed_data(buffer[known:end])
            head, self._buffer, data = self._seen, b"", buffer[end:]
            if head is None or not head.status:
                raise BadAnswer("its head is empty")
            if head.status >= 200:
                self.head = self._understood(head)
                if not known and head.length and head.keep_alive:
                    self._remember(buffer[:end], head)
                return data
            self.ended = False  # 1xx: the answer follows
            if not data:
                return b""

    def _remember(self, raw: bytes, head: Head) -> None:
        """The next answer may have a head like this one."""
        plain = not head.chunked and self._named.lower() in (b"", b",keep-alive") and head.status not in _NO_BODY
        if plain and (like := recurring(raw, _FIXED)) is not None:
            self._known = _Known(like, raw, head)

    def _understood(self, head: Head) -> Head:
        if head.status > 599:
            raise BadAnswer(f"status {head.status}")
        if self._strange:
            raise BadAnswer("its Transfer-Encoding is not chunked")
        if self._named:
            named = {token.strip().lower() for token in self._named.split(b",")}
            head.lines = [line for line in head.lines if line.partition(b":")[0].lower() not in named]
        if not self.ended and not (head.length or head.chunked):
            head.keep_alive = False
            head.mode = Mode.CHUNKED if self._http11 else Mode.PLAIN
        elif head.chunked and not self._http11:
            head.mode, self._payload = Mode.PLAIN, Payload()
        head.events = self._kind.lower().startswith(b"text/event-stream") and not (self._compressed or head.length)
        return head

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        self._excess = self.ended
        self._seen = Head()
        self._kind = self._named = b""
        self._compressed = self._strange = False

    def on_header(self, name: bytes, value: bytes) -> None:
        head = self._seen
        assert head is not None
        if head.status:
            return  # a trailer: it goes on as it is
        lowered = name.lower()
        if lowered not in _HOP:
            head.lines.append(name + b": " + value)
            if lowered in _READ:
                self._read(head, lowered, value)
        elif lowered == b"connection":
            self._named += b"," + value
        elif lowered == b"transfer-encoding":
            self._strange = head.chunked or value.lower() != b"chunked"
            head.chunked = True

    def _read(self, head: Head, name: bytes, value: bytes) -> None:
        match name:
            case b"content-length":
                head.length, self._left = True, int(value)
            case b"content-type":
                self._kind = value
            case b"content-encoding":
                self._compressed = True
            case _:
                head.identified = True

    def on_headers_complete(self) -> None:
        head = self._seen
        assert head is not None
        head.status = self._parser.get_status_code()
        head.keep_alive = self._parser.should_keep_alive()

    def on_chunk_header(self) -> None:
        self.between_chunks = False

    def on_chunk_complete(self) -> None:
        self.between_chunks = True

    def on_message_complete(self) -> None:
        self.ended = True


class Payload:
    """Takes chunks apart, for clients that do not know them."""

    __slots__ = ("_parser", "_pieces")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    def of(self, data: bytes) -> bytes:
        self._parser.feed_data(data)
        payload = b"".join(self._pieces)
        self._pieces.clear()
        return payload

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
