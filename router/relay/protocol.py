"""The uvicorn protocol class under the router: inference requests go from the parser's events straight to the relay.

Everything else on the port goes on to the Starlette application, over the same connections, in order: a request waits
until the one before it is answered (``pipeline`` is uvicorn's; an exchange stands in it like one of its cycles). What
HTTP allows a client to offer and nobody here takes, an upgrade, is taken out of the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from helios.http.protocol import Protocol
from router import errors
from router.relay.alike import Alike
from router.relay.exchange import Exchange
from router.relay.headers import Headers
from router.relay.places import Place
from router.relay.recurring import recurring
from router.relay.relay import Relay
from router.routes import InferenceRoute

OFFER: Final = (b"upgrade", b"http2-settings")
END: Final = b"\r\n\r\n"
FIXED: Final = frozenset({b"connection", b"proxy-connection"})
"""Headers that have the same values in requests whose heads are alike: the parser goes by them."""
MADE: Final = 16
"""Patterns that are made for a connection: to learn heads that are new each time would cost more than it saves."""
SPECIAL: Final = frozenset({b"connection", b"expect", b"transfer-encoding", *OFFER})
"""Headers with which a request always goes through the parser..."""
USUAL: Final = (b"connection", b"keep-alive")
"""...but for this one, which many clients send."""
VERSIONS: Final = ("1.1", "1.0")
PIPELINE: Final = 16
"""Requests that may wait on a connection while it is read on."""
LAST_S: Final = 1.0
"""When the process ends, an idle connection may still bring a request for so many seconds: it may be on its way."""
LINGER_S: Final = 5.0
"""A closed connection whose client does not take the rest is aborted after so many seconds."""


class RelayProtocol(Protocol):
    """One connection of a client; ``relaying`` makes those of one relay."""

    _incoming: Exchange | None = None
    """Whose body is coming."""
    _current: Exchange | None = None
    """Who is being answered."""
    _lingering: asyncio.TimerHandle | None = None
    """Ends the connection of a client that does not take its last answer."""
    _deaf = False
    """Whether what comes is dropped: it can't be understood any more."""
    _leaving = False
    """Whether the process ends: the next answer is the last."""
    _between = True
    """Whether the parser is between two requests and has no byte of the next one."""
    _raw = b""
    """What the parser is fed, where that begins with a request."""
    _like: Alike | None = None
    _made = 0
    _left = 0
    """Bytes of a body that go past the parser and are still to come."""
    _idle_since = 0.0

    def __init__(
        self, relay: Relay, routes: Mapping[bytes, InferenceRoute], config: Config, server_state: ServerState,
        app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None, place: Place | None = None,
    ) -> None:  # fmt: skip
        """``place``: its own, where their number is limited."""
        super().__init__(config, server_state, app_state, _loop)
        self.relay, self.routes, self._place = relay, routes, place
        self._waiting: list[Exchange] = []

    # --- from the loop ---

    def connection_lost(self, exc: Exception | None) -> None:
        if self._place is not None:
            self._place.leave()
        mine = [self._current, *self._waiting] if self._current is not None else self._waiting
        self.pipeline.clear()
        for exchange in mine:
            exchange.gone()
        if any(cast(RequestResponseCycle, exchange) is self.cycle for exchange in mine):
            self._forget()
        if self._lingering is not None:
            self._lingering.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._current is not None:
            self._current.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._current is not None:
            self._current.resume()

    def parse(self, data: bytes) -> None:
        """Feed the parser; an offer to upgrade is taken out of the request, as HTTP allows.

        Java's client offers h2c with its requests, and httptools ends a request that does so at its head: the body
        would be lost. So that head is parsed again without the offer, and the body after it.
        """
        if self._deaf:
            self._unseen = 0
            return
        data = self._past_the_parser(data)
        if not data:
            return
        self._raw = data if self._between else b""
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as offer:
                    if self.parser.get_method() == b"CONNECT":
                        self.send_400_response("CONNECT is not served here.")
                        return
                    self._raw = b""
                    rest = data[offer.args[0] :]
                    data = self._head_without_offer() + rest
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _past_the_parser(self, data: bytes) -> bytes:
        """Take requests that are like the last one, and bodies of such; returns what the parser has to look at."""
        known = self._like
        while data and not self.transport.is_closing() and not self._deaf:
            if self._left:
                body, data = data[: self._left], data[self._left :]
                self._left -= len(body)
                self._body(body)
                if not self._left:
                    self._whole()
                continue
            match = known.like.pattern.match(data) if known is not None and self._between else None
            if known is None or match is None:
                return data
            end = match.end()
            self._left = known.like.size(match)
            query, headers = known.read(match)
            self._ask(known.route, query, headers, http11=True, keep_alive=True, expects=False)
            data = data[end:]
            if not self._left:
                self._whole()
        return b""

    def shutdown(self) -> None:
        """The server ends; uvicorn's own would close an idle connection under a request that is just being sent."""
        self._leaving = True
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._linger(self.transport.close, LAST_S)
        elif not cycle.response_started:  # else its client was told that the connection can be used again
            cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """uvicorn's, but for the timer of an idle connection: that goes on, and looks when it is due."""
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            else:
                self._idle_since = self.loop.time()
                if self.timeout_keep_alive_task is None:
                    self._look_later(self.timeout_keep_alive)
        if self._leaving and (self.cycle is None or self.cycle.response_complete):
            self._linger(self.transport.close, LAST_S)

    def _look_later(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that nobody uses."""
        self.timeout_keep_alive_task = None
        if self._current is not None or (self.cycle is not None and not self.cycle.response_complete):
            return  # its end arms the timer again
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._look_later(left)
        elif self._in_head and not self._unseen:  # else a head is coming, which has a deadline of its own
            super().timeout_keep_alive_handler()

    def refuse_head(self) -> None:
        if self._current is not None or self._waiting:
            self.transport.abort()
        else:
            super().refuse_head()

    # --- from the parser ---

    def on_message_begin(self) -> None:
        self._between = False
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers say nothing to anybody here
            name = name.lower()
            self.headers.append((name, value))
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True

    def on_headers_complete(self) -> None:
        parser, raw = self.parser, self._raw
        self._raw = b""  # what comes next begins elsewhere
        if parser.should_upgrade():
            return
        target = self.url
        version = parser.get_http_version()
        if version not in VERSIONS:
            raise httptools.HttpParserError(f"HTTP/{version}")
        path, _, query = (target if target.startswith(b"/") else _without_authority(target)).partition(b"?")
        route = self.routes.get(path)
        if route is None or parser.get_method() != b"POST":
            headers = self.headers
            HttpToolsProtocol.on_message_begin(self)
            self.url, self.headers = target, headers
            self.scope["headers"] = headers
            self._not_the_last()
            super().on_headers_complete()
            if self._leaving and self.cycle is not None:
                self.cycle.keep_alive = False
            return
        http11 = version == "1.1"
        keep_alive = http11 and parser.should_keep_alive()
        self._ask(route, query, self.headers, http11=http11, keep_alive=keep_alive, expects=self.expect_100_continue)
        if not (keep_alive and raw and target.startswith(b"/")) or self._made == MADE:
            return
        if not any(one[0] in SPECIAL and one != USUAL for one in self.headers):
            like = recurring(raw[: raw.find(END) + len(END)], FIXED, query)
            if like is not None and like.lines == len(self.headers):
                self._like = Alike(like, route, self.headers)
                self._made += like.made

    def _ask(
        self, route: InferenceRoute, query: bytes, headers: Headers, *, http11: bool, keep_alive: bool, expects: bool
    ) -> None:
        """A request that is relayed begins; its turn may be later."""
        self.head_came()
        self._not_the_last()
        exchange = Exchange(
            self.relay, self, route, query, headers,
            http11=http11, keep_alive=keep_alive and not self._leaving, expects=expects,
        )  # fmt: skip
        before = self.cycle
        self.cycle = cast(RequestResponseCycle, exchange)
        self._incoming = exchange
        if before is None or before.response_complete:
            self._begin(exchange)
        else:
            self._waiting.append(exchange)
            if len(self._waiting) > PIPELINE:  # else the end of the connection is noticed
                self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, _RELAYED))

    def _not_the_last(self) -> None:
        if self._leaving and self._lingering is not None:  # it comes at the last moment
            self._lingering.cancel()

    def on_body(self, body: bytes) -> None:
        if self._incoming is None:
            super().on_body(body)
        else:
            self._body(body)

    def _body(self, body: bytes) -> None:
        exchange = self._incoming
        assert exchange is not None
        self.body_came()
        exchange.feed(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._between = True
        if self._incoming is None:
            super().on_message_complete()
        else:
            self._whole()

    def _whole(self) -> None:
        """All of a request that is relayed is here."""
        exchange, self._incoming = self._incoming, None
        assert exchange is not None
        self.message_came()
        if exchange.response_complete:
            self._next(exchange)
        else:
            exchange.complete()

    # --- the relay's side ---

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """uvicorn's: the next of the pipeline has its turn."""
        if app is _RELAYED:
            self._begin(self._waiting.pop(0))
        else:
            super()._start_asgi_task(cycle, app)

    def _begin(self, exchange: Exchange) -> None:
        self._current = exchange
        if self.flow.write_paused:
            exchange.pause()
        exchange.begin()

    def answered(self, exchange: Exchange) -> None:
        """The exchange is over, whichever way, and the client still there."""
        if self._current is exchange:
            self._current = None
        if cast(RequestResponseCycle, exchange) is self.cycle:
            self._forget()
        if self._incoming is exchange and not self._deaf:
            # It was answered before its body had come. To close now would reset the connection under the answer.
            self._linger(self.transport.close)
        else:
            self._next(exchange)

    def _forget(self) -> None:
        """uvicorn knows an exchange as its cycle while it goes on, not when it is over."""
        self.cycle = None  # type: ignore[assignment]

    def _next(self, exchange: Exchange) -> None:
        if exchange.keep_alive:
            self.on_response_complete()
        else:
            self.close_soon()

    def close_soon(self) -> None:
        """End the connection after what was written; a client that does not take it is cut off."""
        self.transport.close()
        self._linger(self.transport.abort)

    def _linger(self, end: Callable[[], object], seconds: float = LINGER_S) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        self._lingering = self.loop.call_later(seconds, end)

    def _head_without_offer(self) -> bytes:
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        for name, value in self.headers:
            tokens = value.split(b",") if name == b"connection" else [value]
            if name not in OFFER:
                lines.append(name + b": " + b",".join(t for t in tokens if t.strip().lower() not in OFFER))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP request; nothing that follows them on the connection can be read."""
        self._deaf = True
        error = errors.invalid_body(msg, "invalid_http")
        if self._incoming is not None:
            self._incoming.refuse(error)
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # what came before is answered, then the connection ends
            return
        body = errors.OPENAI.body(error, "")
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[400] + head + body)
        self.transport.close()


_RELAYED: Final[Any] = object()
"""Stands in uvicorn's pipeline for the application of a request that is relayed."""


def _without_authority(target: bytes) -> bytes:
    """The path and query of an absolute-form target (RFC 9112, 3.2.2); of anything else nothing."""
    scheme, found, rest = target.partition(b"://")
    if not found or scheme.lower() not in (b"http", b"https"):
        return b""
    return b"/" + rest.partition(b"/")[2]


def relaying(relay: Relay, routes: Mapping[bytes, InferenceRoute]) -> Callable[..., RelayProtocol]:
    """Makes the protocols of connections to this relay, from what uvicorn gives each."""
    return partial(RelayProtocol, relay, routes)
