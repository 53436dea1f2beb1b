"""What a client has of its answer, and how that ends.

First it has nothing: then an error is a whole answer. Then it has a head, the worker's, or one of our own with comments
while its request waits (``held``): after that the status can't be taken back. A stream of events that stands between
two events gets an error event in the route's dialect, and in every case the connection ends without the final chunk (or
short of Content-Length), which every HTTP client reports.

The pieces of the body are not here: ``Dispatch.came`` writes them itself, since that is done most often of all.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from router.errors import ApiError, Dialect
from router.relay import ending, held
from router.relay.framing import Framing, Head

if TYPE_CHECKING:
    from router.admission.entry import Entry
    from router.relay.client import Client


class Delivery:
    """One answer. ``keep_alive``, where it is asked for: whether the client may use its connection again."""

    __slots__ = ("_dialect", "_identity", "client", "entry", "head", "held", "http11", "paused", "status", "tail")

    def __init__(self, client: Client, dialect: Dialect, identity: bytes, http11: bool) -> None:
        """``identity``: the request's id; ``http11``: whether the client knows chunks."""
        self.client, self._dialect, self._identity, self.http11 = client, dialect, identity, http11
        self.held = False
        """Whether the head that the client has is ours."""
        self.status = 0
        """That of the head which the client has; 0: it has none."""
        self.head: Head | None = None
        """The worker's, once it is passed on."""
        self.paused = False
        """Whether the client takes less than comes."""
        self.tail = b""
        """The end of what was sent of the body."""
        self.entry: Entry | None = None
        """Who counts what is used, where somebody does."""

    def comment(self, text: bytes, keep_alive: bool) -> None:
        """Tell a stream that waits that it does; the first brings the head."""
        if self.paused:
            return
        data = held.framed(text, self.http11)
        if not self.held:
            self.held, self.status = True, HTTPStatus.OK
            data = held.head(self._identity, self.http11, keep_alive) + data
        self.client.transport.write(data)

    def begin(self, head: Head, piece: bytes, keep_alive: bool) -> None:
        """The worker's head, and what came with it. Raises ApiError where the client has another that does not fit."""
        if self.held and not (head.status == HTTPStatus.OK and head.events):
            raise held.unexpected(head, piece)
        self.status, self.head = head.status, head
        start = piece if self.held else head.encode(self._identity, keep_alive) + piece
        if start:
            self.client.transport.write(start)

    def error(self, error: ApiError, keep_alive: bool) -> None:
        """A whole answer, where the client has nothing yet."""
        content = self._dialect.body(error, self._identity.decode())
        self.status = error.status
        self.client.transport.write(ending.answer(error, content, self._identity, keep_alive))

    def break_off(self, error: ApiError | None, framing: Framing | None) -> None:
        """End an answer that is not whole, with a last event where there is an error and the client can take one.

        ``framing`` is the worker's connection's."""
        client, event = self.client, b""
        if self.paused:
            client.transport.abort()
            return
        if error is not None:
            content = self._dialect.event(error, self._identity.decode())
            if self.held and self.head is None:  # only our own went out, with comments
                event = held.framed(content, self.http11)
            elif ending.takes_event(framing, self.head, self.tail):
                event = ending.event(content, self.head)
        if event:
            client.transport.write(event)
        client.close_soon()
