"""The gRPC server of one process: external processing and health, with TLS if that is wanted.

Each process that relays has one, at the same port (SO_REUSEPORT): the kernel spreads gateways' connections over them,
and what they count is on the board that all share. The supervisor holds the port from before the first is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from helios.errors import Unavailable, UsageError
from helios.rpc.health import HealthService
from router.picker import wire
from router.picker.picker import Picker
from router.picker.port import NAME
from router.picker.stream import Stream
from router.relay.relay import TICK_S
from router.tls import Certificate

log = logging.getLogger("helios.router")

SPARE: Final = 1024
"""Calls beyond the bound on streams: those that are told so, and questions about health."""
LOST_MS: Final = (30_000, 10_000)
"""A connection that says nothing for so long is asked, and is gone if it does not answer for so long."""
CUT_S: Final = 5.0
"""What streams may take to end once they are told to."""


class _Health:
    """Live as long as it answers, ready until the process is told to end."""

    unlive = ""

    def __init__(self) -> None:
        self.unready = "it starts"
        self._changed = asyncio.Event()

    def say(self, unready: str) -> None:
        """Tell whoever watches."""
        self.unready = unready
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)


class PickerServer:
    """``address`` is HOST:PORT, with the port that the supervisor holds."""

    def __init__(self, picker: Picker, address: str) -> None:
        settings = picker.settings
        self._picker, self._address, self._grace_s = picker, address, picker.relay.settings.drain_s
        self._health = _Health()
        most = (picker.relay.settings.max_body_mib + 1) << 20
        self._server: Any = grpc.aio.server(
            maximum_concurrent_rpcs=settings.max_streams + SPARE,
            options=[
                ("grpc.so_reuseport", 1), ("grpc.max_receive_message_length", most),
                ("grpc.keepalive_time_ms", LOST_MS[0]), ("grpc.keepalive_timeout_ms", LOST_MS[1]),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000), ("grpc.http2.max_ping_strikes", 0),
            ],
        )  # fmt: skip
        handler = grpc.stream_stream_rpc_method_handler(self._process, wire.decode, None)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(wire.SERVICE, {"Process": handler}),
                HealthService(self._health, (wire.SERVICE,), SPARE // 2).handler(),
            )
        )
        self._credentials = None
        if settings.tls_cert:
            self._credentials = _credentials(settings.tls_cert, settings.tls_key)
        self._leaving = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve while the context lasts, then until the streams have ended. Raises Unavailable."""
        try:
            if self._credentials is None:
                self._server.add_insecure_port(self._address)
            else:
                self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            raise Unavailable(f"gateways can't be served at {self._address}: {error}") from None
        await self._server.start()
        self._health.say("")
        async with asyncio.TaskGroup() as tasks:
            ticking, ending = tasks.create_task(self._tick()), tasks.create_task(self._end())
            try:
                yield
            finally:
                self._leaving.set()
                await asyncio.wait((ending,))
                ticking.cancel()
                self._picker.ledger.close()

    def leave(self) -> None:
        """Take no new requests, and end when those there are have."""
        self._leaving.set()

    async def _end(self) -> None:
        await self._leaving.wait()
        self._health.say("the process ends")
        # ``Drain`` cuts what is left when the grace is over, which ends every stream in order.
        await self._server.stop(self._grace_s + CUT_S)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._picker.ledger.tick(self._picker.relay.now())

    async def _process(self, _requests: object, context: Any) -> None:
        picker = self._picker
        picker.streams += 1
        try:
            await Stream(picker, context, grpc.aio.EOF).run()
        finally:
            picker.streams -= 1


def _credentials(cert: str, key: str) -> Any:
    """The certificate in these files, and the one that will be there later. Raises UsageError."""
    certificate = Certificate(cert, key, NAME)

    def read() -> Any:
        with open(key, "rb") as secret, open(cert, "rb") as chain:
            return grpc.ssl_server_certificate_configuration([(secret.read(), chain.read())])

    def renewed() -> Any:
        """Asked at each handshake, in a thread of gRPC's."""
        try:
            if certificate.refresh():
                log.info("the picker's certificate was renewed")
                return read()
        except (OSError, UsageError) as error:
            log.error("the picker's new certificate can't be used; the old one stays", extra={"reason": str(error)})
        return None

    return grpc.dynamic_ssl_server_credentials(read(), renewed, require_client_authentication=False)
