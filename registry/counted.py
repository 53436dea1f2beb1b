"""Answers whose bytes are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prometheus_client import Counter
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class FileAnswer(Protocol):
    """An ASGI response that sends a file; ``sent`` is how many of its bytes have left."""

    sent: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Counted(Response):
    """Sends a file and counts what really left."""

    def __init__(
        self, response: FileAnswer, *counters: Counter, told: Callable[[int], object] = lambda _sent: None
    ) -> None:
        """``told`` hears the bytes, too."""
        super().__init__()
        self._response, self._counters, self._told = response, counters, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            for counter in self._counters:
                counter.inc(self._response.sent)
            self._told(self._response.sent)
