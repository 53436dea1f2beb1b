"""What an exchange needs of whoever asks: a connection (``protocol``), or a part of the router itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from router.relay.exchange import Exchange


class Transport(Protocol):
    def write(self, data: bytes) -> None:
        """Bytes of the answer, in HTTP/1.1."""
        ...

    def abort(self) -> None:
        """The answer ends here, though it is not whole."""
        ...


class Flow(Protocol):
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Client(Protocol):
    @property
    def transport(self) -> Transport: ...
    @property
    def flow(self) -> Flow:
        """What brings the request's body, which may have to wait."""
        ...

    def close_soon(self) -> None:
        """The answer ends with what was written, though it is not whole."""
        ...

    def answered(self, exchange: Exchange) -> None:
        """The exchange is over, and its client still there."""
        ...
