"""KEDA's external scaler, pull and push, over gRPC (externalscaler.proto).

``IsActive`` says whether anything is asked of a service; ``StreamIsActive`` says so at once when it changes, and again
every ``AGAIN_S``. What is not known is an error of the call (UNAVAILABLE), and nothing on the stream: KEDA leaves
replicas as they are then. Who may use 0 replicas is decided elsewhere (docs/scaling-signals.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

from helios.config import TlsSettings
from helios.errors import HeliosError, NoSpace, Unavailable, UsageError
from helios.http.hosts import bracketed, split_listen
from helios.http.tls import looks
from helios.metrics import SignalsMetrics
from helios.pulse import Pulse
from helios.rpc.health import Health, HealthService
from helios.rpc.status import status_of
from orchestrator.signals import externalscaler_pb2 as messages
from orchestrator.signals.asked import Asked, asked
from orchestrator.signals.values import Values

log = logging.getLogger("helios.operator")

NAME: Final = "externalscaler.ExternalScaler"
AGAIN_S: Final = 10.0
"""How often a stream says again what it has said, in seconds: KEDA may have missed it, or begun anew."""
MOST_CALLS: Final = 1024
MOST_STREAMS: Final = 512
GRACE_S: Final = 2.0
"""How long calls under way may go on at the end, in seconds."""

Method = Callable[[Any], Awaitable[Any]]


class Scaler:
    """The service. ``pulse`` beats when what is known may be another thing."""

    def __init__(self, values: Values, pulse: Pulse, metrics: SignalsMetrics) -> None:
        self._values, self._pulse, self._metrics = values, pulse, metrics
        self._streams = 0

    def handler(self) -> Any:
        """Its gRPC handler."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        ref, active = messages.ScaledObjectRef.FromString, messages.IsActiveResponse.SerializeToString
        methods = {
            "IsActive": unary(self._answering("IsActive", self._is_active), ref, active),
            "StreamIsActive": stream(self._stream, ref, active),
            "GetMetricSpec": unary(
                self._answering("GetMetricSpec", self._spec), ref, messages.GetMetricSpecResponse.SerializeToString
            ),
            "GetMetrics": unary(
                self._answering("GetMetrics", self._metrics_of), messages.GetMetricsRequest.FromString,
                messages.GetMetricsResponse.SerializeToString,
            ),
        }  # fmt: skip
        return grpc.method_handlers_generic_handler(NAME, methods)

    # --- the methods ---

    async def _is_active(self, ref: Any) -> Any:
        return messages.IsActiveResponse(result=self._values.busy(_asked(ref).chosen))

    async def _spec(self, ref: Any) -> Any:
        wanted = _asked(ref)
        self._values.check(wanted.chosen)
        whole = max(1, round(wanted.target))
        spec = messages.MetricSpec(metricName=wanted.metric, targetSize=whole, targetSizeFloat=wanted.target)
        return messages.GetMetricSpecResponse(metricSpecs=[spec])

    async def _metrics_of(self, request: Any) -> Any:
        """KEDA asks by the name that it made of ours and the trigger's place; the metadata says which is meant."""
        wanted = _asked(request.scaledObjectRef)
        value = self._values.value(wanted.metric, wanted.chosen)
        found = messages.MetricValue(
            metricName=request.metricName or wanted.metric, metricValue=round(value), metricValueFloat=value
        )
        return messages.GetMetricsResponse(metricValues=[found])

    async def _stream(self, ref: Any, context: Any) -> AsyncIterator[Any]:
        try:
            chosen = _asked(ref).chosen
            self._values.check(chosen)
            if self._streams >= MOST_STREAMS:
                raise NoSpace(f"there are {MOST_STREAMS} streams already")
        except HeliosError as error:
            await self._refuse("StreamIsActive", error, context)
        self._streams += 1
        self._metrics.scaler_streams.set(self._streams)
        try:
            async for active in self._changes(chosen):
                yield messages.IsActiveResponse(result=active)
        except HeliosError as error:  # the service is there no more
            await self._refuse("StreamIsActive", error, context)
        finally:
            self._streams -= 1
            self._metrics.scaler_streams.set(self._streams)

    async def _changes(self, chosen: Any) -> AsyncIterator[bool]:
        said, said_at, loop = None, 0.0, asyncio.get_running_loop()
        while True:
            version = self._pulse.version
            try:
                now = self._values.busy(chosen)
            except Unavailable:
                said = None  # what it is when it is known again is said
            else:
                if now is not said or loop.time() - said_at >= AGAIN_S:
                    said, said_at = now, loop.time()
                    yield now
            await self._pulse.after(version, AGAIN_S)

    # --- calls ---

    def _answering(self, name: str, method: Method) -> Callable[[Any, Any], Awaitable[Any]]:
        async def answer(request: Any, context: Any) -> Any:
            try:
                found = await method(request)
            except HeliosError as error:
                await self._refuse(name, error, context)
            except Exception:
                log.exception("a call failed", extra={"call": name})
                self._metrics.scaler_calls.labels(name, "INTERNAL").inc()
                await context.abort(grpc.StatusCode.INTERNAL, f"{name} failed; the operator's log says why")
            self._metrics.scaler_calls.labels(name, "OK").inc()
            return found

        return answer

    async def _refuse(self, name: str, error: HeliosError, context: Any) -> None:
        status = status_of(error)
        self._metrics.scaler_calls.labels(name, status).inc()
        await context.abort(getattr(grpc.StatusCode, status), str(error).replace("\n", " "))


def _asked(ref: Any) -> Asked:
    return asked(ref.namespace, dict(ref.scalerMetadata))


@asynccontextmanager
async def serving_scaler(scaler: Scaler, health: Health, listen: str, tls: TlsSettings) -> AsyncIterator[str]:
    """Answer at ``host:port`` while the context lasts; its value is the address. Port 0 takes a free one. With a
    certificate over TLS, which is renewed when its files change. Raises UsageError, Unavailable."""
    host, port = split_listen(listen, "operator.signals.scaler_listen")
    server: Any = grpc.aio.server(maximum_concurrent_rpcs=MOST_CALLS, options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((scaler.handler(), HealthService(health).handler()))
    address = f"{bracketed(host)}:{port}"
    try:
        if tls.cert:
            found = server.add_secure_port(address, _credentials(tls))
        else:
            found = server.add_insecure_port(address)
    except RuntimeError as error:
        raise Unavailable(f"operator.signals.scaler_listen: {address} can't be listened on: {error}") from None
    await server.start()
    log.info("serving KEDA's external scaler", extra={"address": f"{host}:{found}", "tls": bool(tls.cert)})
    try:
        yield f"{bracketed(host)}:{found}"
    finally:
        await server.stop(GRACE_S)


def _credentials(tls: TlsSettings) -> Any:
    """Raises UsageError for files that can't be read."""
    files = [tls.cert, tls.key, *([tls.client_ca] if tls.client_ca else [])]
    seen = looks(*files)

    def configuration() -> Any:
        pair = (_read(tls.key), _read(tls.cert))
        root = _read(tls.client_ca) if tls.client_ca else None
        return grpc.ssl_server_certificate_configuration([pair], root)

    def fetch() -> Any:
        """Asked before each handshake; None: as before."""
        nonlocal seen
        now = looks(*files)
        if now == seen:
            return None
        try:
            found = configuration()
        except UsageError as error:
            log.error("the new certificate can't be used; the old one stays", extra={"reason": error.message})
            return None
        seen = now
        return found

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, bool(tls.client_ca))


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None
