"""Words for another process, gathered: those of one turn of the event loop go in one message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from router.admission.line_words import MOST, ToOwner


class Outbox:
    """``send`` gets at most ``MOST`` words at a time, in order."""

    def __init__(self, send: Callable[[list[ToOwner]], None]) -> None:
        self._send = send
        self._words: list[ToOwner] = []

    def append(self, word: ToOwner) -> None:
        if not self._words:
            asyncio.get_running_loop().call_soon(self._flush)
        self._words.append(word)

    def clear(self) -> None:
        """What was not sent is not."""
        self._words.clear()

    def _flush(self) -> None:
        words, self._words = self._words, []
        for begin in range(0, len(words), MOST):
            self._send(words[begin : begin + MOST])
