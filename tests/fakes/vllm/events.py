"""The KV events of a fake: the blocks of every prompt that it computes, published as vLLM publishes them.

Its cache keeps everything, until it is told to forget.
"""

from __future__ import annotations

import hashlib

from tests.support.kv_events import encode, stored
from tests.support.kv_publisher import Server


class Events:
    """A cache and its publisher. ``block``: tokens in a block."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._held: set[int] = set()
        self._losing = 0
        self._server: Server | None = Server()
        self.ports = self._server.port, self._server.replay_port
        """Of the events and of their replay."""

    def computed(self, prompt: list[int]) -> None:
        """The prompt is in the cache: publish its blocks that were not."""
        names: list[int] = []
        parent, name = None, 0
        for end in range(self._block, len(prompt) + 1, self._block):
            name = _name(name, prompt[end - self._block : end])
            if name in self._held:
                parent = name
            else:
                names.append(name)
        if not names:
            return
        self._held.update(names)
        first = len(prompt) // self._block - len(names)
        new = prompt[first * self._block : len(prompt) // self._block * self._block]
        if self._server is not None:
            lost, self._losing = self._losing > 0, max(0, self._losing - 1)
            self._server.publish(encode([stored(names, parent, new, self._block)]), lost=lost)

    def order(self, *, lose: int = 0, away: bool | None = None) -> None:
        """``lose``: so many of the next messages reach nobody. ``away``: the process is gone, with all it had; or there
        is another one at its ports."""
        self._losing += lose
        if away is not None:
            self.close()
            self._held.clear()
            self._server = None if away else Server(*self.ports)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


def _name(parent: int, tokens: list[int]) -> int:
    """A block's name, by all that is before it."""
    return int.from_bytes(hashlib.sha256(f"{parent}:{tokens}".encode()).digest()[:8], "big")
