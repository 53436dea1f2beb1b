"""One connection of a client at the protocol class, with what it is asked in the place of a relay."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from helios.http.server import make_config
from router.relay import protocol
from router.relay.headers import Headers
from router.routes import RAW_ROUTES, InferenceRoute


class Asked:
    """Stands for an exchange: says what it was asked and answers when the body is whole."""

    log: list[object]

    def __init__(
        self, relay: object, client: protocol.RelayProtocol, route: InferenceRoute, query: bytes, raw: Headers,
        *, http11: bool, keep_alive: bool, expects: bool,
    ) -> None:  # fmt: skip
        self.client, self.keep_alive, self.body, self.whole, self.turn = client, keep_alive, b"", False, False
        self.response_complete = self.response_started = False
        self.about = (route.path, query, list(raw), http11, keep_alive, expects)

    def begin(self) -> None:
        self.turn = True
        self._end()

    def feed(self, body: bytes) -> None:
        self.body += body

    def complete(self) -> None:
        self.whole = True
        self._end()

    def refuse(self, error: object) -> None:
        self.log.append("refused")
        self.keep_alive = False
        self.response_complete = True
        self.client.answered(self)  # type: ignore[arg-type]

    def gone(self) -> None:
        self.log.append("gone")

    def _end(self) -> None:
        if self.turn and self.whole:
            self.log.append((*self.about, self.body))
            self.response_complete = True
            self.client.transport.write(b"answer to %b\n" % self.body)
            self.client.answered(self)  # type: ignore[arg-type]


class Client(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = b"", False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def served(pieces: Sequence[bytes], patience_s: float = 0.0) -> tuple[list[object], bytes, bool]:
    """What a connection on which these bytes come makes of them: what exchanges were asked, what was answered, and
    whether it was closed, which is waited for ``patience_s``. ``protocol.Exchange`` has to be ``Asked``."""
    app = Starlette(routes=[Route("/hello", hello)])
    config = make_config(app, http=protocol.relaying(None, RAW_ROUTES), date_header=False)  # type: ignore[arg-type]
    config.load()
    made: Any = config.http_protocol_class
    log: list[object] = []
    Asked.log = log
    connection, client = made(config, ServerState(), {}, asyncio.get_running_loop()), Client()
    connection.connection_made(client)
    for piece in pieces:
        if not client.closed:
            connection.data_received(piece)
        for _ in range(8):
            await asyncio.sleep(0)
    end = asyncio.get_running_loop().time() + patience_s
    while not client.closed and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.01)
    closed = client.closed
    connection.connection_lost(ConnectionResetError())
    return log, client.written, closed
