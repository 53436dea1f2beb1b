"""One end of a connection between a data process and the owner of the index: frames both ways, over a unix socket."""

from __future__ import annotations

import asyncio
import logging
from typing import Generic, TypeVar, cast

from router.processes.frames import Cutter

log = logging.getLogger("helios.router")

M = TypeVar("M")


class Link(asyncio.Protocol, Generic[M]):
    """The heir hears of messages (``came``) and of the end (``ended``)."""

    def __init__(self, cutter: Cutter[M], unread: int, nonsense: str) -> None:
        """``unread``: bytes that the other end has not read, beyond which it is told no more; ``nonsense``: what the
        log says of bytes that are no message, with which the connection ends."""
        self._cutter, self._unread, self._nonsense = cutter, unread, nonsense
        self._transport: asyncio.Transport | None = None

    def came(self, found: list[M]) -> None:
        """These came, in order, or a part of one."""
        raise NotImplementedError

    def ended(self) -> None:
        """The connection is gone."""
        raise NotImplementedError

    @property
    def able(self) -> bool:
        """Whether something can be sent."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and transport.get_write_buffer_size() < self._unread

    def send(self, frame: bytes) -> None:
        """Send it: only while the link is ``able``."""
        assert self._transport is not None
        self._transport.write(frame)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- what the loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            found = self._cutter.feed(data)
        except ValueError as error:
            log.error(self._nonsense, extra={"reason": str(error)})
            self.close()
            return
        self.came(found)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.ended()
