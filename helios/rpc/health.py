"""The gRPC health checking protocol, ``grpc.health.v1.Health``, beside a daemon's own services.

Source: grpc/grpc, doc/health-checking.md and src/proto/grpc/health/v1/health.proto. The messages have a field each, so
they are described here and not compiled; a descriptor pool of their own keeps them apart from another copy.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, Protocol

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

NAME: Final = "grpc.health.v1.Health"
UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN = 0, 1, 2, 3
LOOK_S: Final = 1.0
"""How often a watch looks whether the daemon is live, in seconds."""
MAX_WATCHES: Final = 32


def _messages() -> tuple[Any, Any]:
    file = FileDescriptorProto(name="grpc/health/v1/health.proto", package="grpc.health.v1", syntax="proto3")
    request, response = (
        file.message_type.add(name="HealthCheckRequest"),
        file.message_type.add(name="HealthCheckResponse"),
    )
    field = request.field.add(name="service", number=1)
    field.label, field.type = field.LABEL_OPTIONAL, field.TYPE_STRING
    kinds = response.enum_type.add(name="ServingStatus")
    for number, name in enumerate(("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")):
        kinds.value.add(name=name, number=number)
    field = response.field.add(name="status", number=1)
    field.label, field.type = field.LABEL_OPTIONAL, field.TYPE_ENUM
    field.type_name = ".grpc.health.v1.HealthCheckResponse.ServingStatus"
    pool = DescriptorPool()
    pool.Add(file)
    found = (pool.FindMessageTypeByName(f"grpc.health.v1.{name}") for name in (request.name, response.name))
    asked, answered = (GetMessageClass(each) for each in found)
    return asked, answered


Request, Response = _messages()


class Health(Protocol):
    """What a daemon says of itself."""

    @property
    def unlive(self) -> str:
        """Why only a restart would help; empty: nothing is wrong."""
        ...

    @property
    def unready(self) -> str:
        """Why it is not to be used yet; empty: it is."""
        ...

    async def changed(self, timeout_s: float) -> None:
        """Wait until something is told, or for so long, in seconds."""
        ...


class HealthService:
    """The service ``""``, and ``readiness``, is served when the daemon is ready; ``liveness`` while it is live.
    ``services``: those that it has beside them, by their full names, each served when it is ready."""

    def __init__(self, health: Health, services: Iterable[str] = (), max_watches: int = MAX_WATCHES) -> None:
        self._health, self._max_watches = health, max_watches
        self._why: dict[str, Callable[[], str]] = {
            **dict.fromkeys(("", "readiness", *services), lambda: health.unready),
            "liveness": lambda: health.unlive,
        }
        self._watches = 0

    def handler(self) -> Any:
        """Its gRPC handler."""
        to, of = Request.FromString, Response.SerializeToString
        methods = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, request_deserializer=to, response_serializer=of),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, request_deserializer=to, response_serializer=of),
        }
        return grpc.method_handlers_generic_handler(NAME, methods)

    def _status(self, service: str) -> int:
        why = self._why.get(service)
        if why is None:
            return SERVICE_UNKNOWN
        return NOT_SERVING if why() else SERVING

    async def _check(self, request: Any, context: Any) -> Any:
        status = self._status(request.service)
        if status == SERVICE_UNKNOWN:
            known = ", ".join(repr(name) for name in self._why)
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:80]!r} here; known: {known}"
            )
        return Response(status=status)

    async def _watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The state now, and again whenever it has changed, until the caller has enough."""
        if self._watches >= self._max_watches:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_watches} watch already")
        self._watches += 1
        try:
            said = None
            while True:
                status = self._status(request.service)
                if status != said:
                    said = status
                    yield Response(status=status)
                await self._health.changed(LOOK_S)
        finally:
            self._watches -= 1
