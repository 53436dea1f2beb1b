"""A client's connection for which there is no place: its request is answered with 503, and then it ends.

The request's head is read first. So a client has the answer to what it asked, as any other, in the dialect of the route
and over TLS too; and who asks whether the process lives is answered: a router that is full is well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prometheus_client import Counter
from uvicorn.config import Config
from uvicorn.server import ServerState

from router import errors
from router.relay import ending
from router.relay.headers import request_id
from router.relay.placed import Placed
from router.relay.places import Place
from router.routes import PROBES, InferenceRoute


class TurnedAway(Placed):
    """One connection; ``turning_away`` makes those of one process."""

    _told = False

    def __init__(
        self, routes: Mapping[bytes, InferenceRoute], told: Counter, config: Config, server_state: ServerState,
        app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None, *, place: Place,
    ) -> None:  # fmt: skip
        super().__init__(config, server_state, app_state, _loop, place=place)
        self._routes, self._counter = routes, told

    def on_headers_complete(self) -> None:
        path = self.url.partition(b"?")[0]
        if path not in PROBES:  # which are answered all the same
            self._tell(path)
        elif not self._told:
            super().on_headers_complete()
            self.cycle.keep_alive = False

    def _tell(self, path: bytes) -> None:
        self.head_came()
        if self._told:
            return
        self._told = True
        self._counter.inc()
        error, identity = errors.too_many_connections(), request_id(self.headers)
        dialect = self._routes[path].dialect if path in self._routes else errors.OPENAI
        content = dialect.body(error, identity.decode())
        self.transport.write(ending.answer(error, content, identity, keep_alive=False))

    def on_body(self, body: bytes) -> None:
        if self._told:  # taken and dropped: to close now would reset the connection under the answer
            self.body_came()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._told:
            self.transport.close()
        else:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._told:
            self.transport.close()
        else:
            super().send_400_response(msg)


def turning_away(routes: Mapping[bytes, InferenceRoute], told: Counter) -> Callable[..., TurnedAway]:
    """Makes such connections, from what uvicorn gives each and their ``place``; ``told`` counts the answers."""
    return partial(TurnedAway, routes, told)
