"""Whose request is begun next: places for so many at a time, given in turn to those who want one.

A place is only given while the workers of the model have little else to do (``room``), so that batches take what others
leave. Turns go round between pairs of tenant and model; whoever waits for a busy model holds nobody up.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

LOOK_S: Final = 0.1
"""How often ``serve`` is called besides: what workers do otherwise is not told here."""


class Slots:
    """``most`` places. Everything is one step in the event loop's thread."""

    def __init__(self, most: int, room: Callable[[str], bool]) -> None:
        self._most, self._room, self.used = most, room, 0
        self._waiting: OrderedDict[tuple[str, str], deque[asyncio.Future[None]]] = OrderedDict()

    async def take(self, tenant: str, model: str) -> None:
        """Wait for a place; whoever has it gives it back. Cancelled, none is kept."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault((tenant, model), deque()).append(turn)
        self.serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had been given just now
                self.give()
            raise

    def give(self) -> None:
        """A place is free."""
        self.used -= 1
        self.serve()

    def serve(self) -> None:
        """Give the places that there are."""
        while self.used < self._most and self._next():
            self.used += 1

    def _next(self) -> bool:
        for key, turns in list(self._waiting.items()):
            while turns and turns[0].done():  # cancelled meanwhile
                turns.popleft()
            if not turns:
                del self._waiting[key]
            elif self._room(key[1]):
                turns.popleft().set_result(None)
                self._waiting.move_to_end(key)
                return True
        return False
