"""A connection that has a place (``Places``): it leaves that at its end, and lasts only a moment if it is refused."""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from helios.http.protocol import Protocol
from router.relay.places import Place

LAST_S: Final = 2.0
"""How long a refused connection lasts, however much of the request comes and whatever is taken of the answer."""


class Placed(Protocol):
    """One connection. A refused one answers with ``refusing``, an application, or as says who inherits from this."""

    _end: asyncio.TimerHandle | None = None

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None, *, place: Place,
        refusing: ASGIApp | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, server_state, app_state, _loop)
        self._place = place
        if place.refused and refusing is not None:
            self.app = cast(Any, refusing)  # the same thing, in Starlette's words and in uvicorn's

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._place.refused:
            self._end = self.loop.call_later(LAST_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._place.leave()
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)
