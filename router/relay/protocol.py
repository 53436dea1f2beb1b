"""The uvicorn protocol class under the router: a way to break a connection off, and errors in OpenAI's form.

ASGI knows only whole answers; a relay must be able to end one so that the client notices. The extension
``router.cut`` has two functions: ``close`` ends the connection after what was written, without the final chunk;
``abort`` drops what was written too, for a client that takes nothing. The fast relay will take this class's place.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router import errors

CUT: Final = "router.cut"
LINGER_S: Final = 5.0
"""A closed connection whose client does not take the rest is aborted after so many seconds."""


class RelayProtocol(HttpToolsProtocol):
    """uvicorn's protocol plus ``router.cut``."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        extensions: dict[str, Any] = cycle.scope.setdefault("extensions", {})
        extensions[CUT] = Cut(cycle)
        super()._start_asgi_task(cycle, app)

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
