"""Asks the router's own data plane, in this process and without a connection: an exchange whose client is a future.

So a line takes the way of every other request (rights, limits, queue, policy, breakers, retries), as whoever its batch
belongs to, and no credentials have to be kept or made up for it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import httptools
import msgspec

from router.relay.exchange import Exchange
from router.routes import InferenceRoute

if TYPE_CHECKING:
    from router.admission.rights import Principal
    from router.relay.relay import Relay

MAX_ANSWER: Final = 32 << 20
"""Longest answer that is taken, in bytes."""


class Answer(msgspec.Struct, frozen=True):
    """A whole answer. ``retry_after_s``: what it says of when to come back, None where it doesn't."""

    status: int
    body: bytes
    request_id: str
    retry_after_s: float | None = None


class NoAnswer(Exception):
    """It broke off, or is too long; the text says so."""


async def ask(relay: Relay, route: InferenceRoute, body: bytes, request_id: str, principal: Principal | None) -> Answer:
    """One request, to its end: the relay's deadlines are those of every request. Cancelled it is given up, at the
    worker too. Raises NoAnswer."""
    client = _Client()
    headers = [
        (b"content-type", b"application/json"), (b"accept", b"application/json"),
        (b"x-request-id", request_id.encode()), (b"content-length", b"%d" % len(body)),
    ]  # fmt: skip
    exchange = Exchange(
        relay, client, route, b"", headers, http11=True, keep_alive=True, expects=False, principal=principal,
        urgent=False,
    )  # fmt: skip
    try:
        exchange.begin()
        exchange.feed(body)
        exchange.complete()
        return await client.answer
    finally:
        if not exchange.response_complete:
            exchange.gone()


class _Client:
    """Stands for the connection: what the exchange writes is read, and ``answer`` is what comes of it."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.transport = self.flow = self
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._size, self._whole = 0, False
        self._request_id = ""
        self._retry_after_s: float | None = None

    # --- from the exchange ---

    def write(self, data: bytes) -> None:
        if not self.answer.done():
            self._parser.feed_data(data)

    def abort(self) -> None:
        pass

    close_soon = pause_reading = resume_reading = abort

    def answered(self, exchange: Exchange) -> None:
        if self.answer.done():
            return
        if not self._whole:
            self.answer.set_exception(NoAnswer("the answer broke off"))
            return
        status = self._parser.get_status_code()
        self.answer.set_result(Answer(status, b"".join(self._parts), self._request_id, self._retry_after_s))

    # --- from the parser ---

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"x-request-id":
            self._request_id = value.decode("latin-1")
        elif name == b"retry-after" and value.isdigit():
            self._retry_after_s = float(value)

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > MAX_ANSWER:
            if not self.answer.done():
                self.answer.set_exception(NoAnswer(f"the answer is longer than {MAX_ANSWER >> 20} MiB"))
            return
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._whole = True
