"""The uvicorn protocol class under the router: a way to break a connection off, and errors in OpenAI's form.

ASGI knows only whole answers; a relay must be able to end one so that the client notices. The extension
``router.cut`` has two functions: ``close`` ends the connection after what was written, without the final chunk;
``abort`` drops what was written too, for a client that takes nothing. The fast relay will take this class's place.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router import errors

CUT: Final = "router.cut"
OFFER: Final = (b"upgrade", b"http2-settings")
LINGER_S: Final = 5.0
"""A closed connection whose client does not take the rest is aborted after so many seconds."""


class RelayProtocol(HttpToolsProtocol):
    """uvicorn's protocol plus ``router.cut``."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        extensions: dict[str, Any] = cycle.scope.setdefault("extensions", {})
        extensions[CUT] = Cut(cycle)
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; an offer to upgrade is taken out of the request, as HTTP allows.

        Java's client offers h2c with its requests, and httptools ends a request that does so at its head: the body
        would be lost. So that head is parsed again without the offer, and the body after it.
        """
        self._unset_keepalive_if_required()
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as offer:
                    if self.parser.get_method() == b"CONNECT":
                        self.send_400_response("CONNECT is not served here.")
                        return
                    rest = data[offer.args[0] :]
                    data = self._head_without_offer() + rest
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _head_without_offer(self) -> bytes:
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        for name, value in self.headers:
            tokens = value.split(b",") if name == b"connection" else [value]
            if name not in OFFER:
                lines.append(name + b": " + b",".join(t for t in tokens if t.strip().lower() not in OFFER))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP request."""
        body = errors.OPENAI.body(errors.invalid_body(msg, "invalid_http"), "")
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[400] + head + body)
        self.transport.close()


class Cut:
    """Ends one request's connection."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def close(self) -> None:
        self._cycle.disconnected = True  # so uvicorn does not report an answer left incomplete
        transport = self._cycle.transport
        transport.close()
        asyncio.get_running_loop().call_later(LINGER_S, transport.abort)

    def abort(self) -> None:
        self._cycle.disconnected = True
        self._cycle.transport.abort()
