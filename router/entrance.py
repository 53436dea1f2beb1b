"""Where requests enter that the router answers itself: models, files, batches, and all that is not served.

Each has an id, as those that are relayed have, which stands in its answer; and a span of the server's kind, where the
router has tracing and the request is none of a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import getrandbits
from typing import TYPE_CHECKING, Any, Final

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.relay.headers import request_id
from router.relay.trace import trace_of
from router.routes import PROBES

if TYPE_CHECKING:
    from router.tracing.recorder import Recorder

IDENTITY: Final = "helios.request_id"
"""Where a request's scope has its id."""
HEADER: Final = b"x-request-id"


class Entrance:
    """The ASGI application ``app``, whose ``routes`` these are, each with an endpoint of its own. ``tracing``: where
    spans are recorded, if they are."""

    def __init__(
        self, app: ASGIApp, routes: Iterable[Route], tracing: Recorder | None,
        bits: Callable[[int], int] = getrandbits,
    ) -> None:  # fmt: skip
        """``bits``: random ones, for ids."""
        self._app, self._tracing, self._bits = app, tracing, bits
        self._paths: dict[Any, str] = {route.endpoint: route.path for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = scope[IDENTITY] = request_id(scope["headers"], self._bits)
        served = None
        if self._tracing is not None and scope["raw_path"] not in PROBES:
            trace = trace_of(scope["headers"], self._bits)
            served = self._tracing.serves(scope["method"], scope["raw_path"], identity, trace)

        async def heard() -> Message:
            message = await receive()
            if served is not None and message["type"] == "http.disconnect":
                served.left()
            return message

        async def said(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                if all(name != HEADER for name, _ in headers):
                    message["headers"] = [*headers, (HEADER, identity)]
                if served is not None:
                    served.status = message["status"]
            await send(message)
            if served is not None and message["type"] == "http.response.body" and not message.get("more_body"):
                served.whole = True

        try:
            await self._app(scope, heard, said)
        finally:
            if served is not None:
                served.end(self._paths.get(scope.get("endpoint"), ""))
