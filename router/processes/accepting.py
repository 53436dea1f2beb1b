"""uvicorn's server on sockets of which it takes connections one by one, each with a place (accept.py)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import cast

from helios.http.server import Server, ServerConfig
from router.processes.accept import Acceptor
from router.relay.places import Place, Places

Listening = tuple[Sequence[socket.socket], Places]
"""Listening sockets, and the places that their connections share."""


class Accepting(Server):
    """A server of these sockets. ``made``: makes a connection's protocol, as uvicorn does and with its ``place``;
    ``on_stop``: see ``Server``."""

    def __init__(
        self, config: ServerConfig, listening: Sequence[Listening], made: Callable[..., object],
        on_stop: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, on_stop)
        self._listening, self._made = listening, made
        self._acceptors: list[Acceptor] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        config, loop = self.config, asyncio.get_running_loop()

        def protocol(place: Place) -> asyncio.Protocol:
            made = self._made(config, self.server_state, self.lifespan.state, loop, place=place)
            return cast(asyncio.Protocol, made)

        self._acceptors = [Acceptor(own, protocol, config.ssl, places) for own, places in self._listening]
        for acceptor in self._acceptors:
            acceptor.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for acceptor in self._acceptors:
            await acceptor.stop()
        await super().shutdown(sockets)
