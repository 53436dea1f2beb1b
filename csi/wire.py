"""gRPC methods from the services of csi.proto and plain coroutines, and errors as the statuses that callers know.

The handlers are made from the services' descriptors, so no generated service code is needed. A call is worked on by a
task of its own: a caller who gives up does not leave a volume half published, and who asks again meanwhile is told that
it is pending.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message_factory import GetMessageClass

from csi.errors import status_of
from csi.until import Until
from helios.errors import HeliosError
from helios.metrics import CsiMetrics

log = logging.getLogger("csi")

EARLY: Final = 0.9
"""Share of the time that the caller gives after which we give up."""

Method = Callable[[Any, Until], Awaitable[Any]]
"""A request, and until when the answer is wanted -> the answer. Raises HeliosError."""


class Work:
    """The calls that are worked on. Owns their tasks."""

    def __init__(self, deadline_s: float, metrics: CsiMetrics) -> None:
        """``deadline_s``: longest time for one call, in seconds; a shorter one of the caller counts."""
        self._deadline_s, self._metrics = deadline_s, metrics
        self._tasks: set[asyncio.Task[Any]] = set()

    def handler(self, service: Any, methods: Mapping[str, Method]) -> Any:
        """The gRPC handler of a service's descriptor; methods that are missing are UNIMPLEMENTED."""
        found = {}
        for name, method in methods.items():
            described = service.methods_by_name[name]
            found[name] = grpc.unary_unary_rpc_method_handler(
                self._serving(name, method),
                request_deserializer=GetMessageClass(described.input_type).FromString,
                response_serializer=GetMessageClass(described.output_type).SerializeToString,
            )
        return grpc.method_handlers_generic_handler(service.full_name, found)

    async def finish(self, grace_s: float) -> None:
        """Wait for what is under way, then cancel it."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _serving(self, name: str, method: Method) -> Callable[[Any, Any], Awaitable[Any]]:
        async def serve(request: Any, context: Any) -> Any:
            remaining = context.time_remaining()
            # Our reason has to come before the caller's deadline does.
            until = Until(self._deadline_s if remaining is None else min(self._deadline_s, EARLY * remaining))
            task = asyncio.ensure_future(self._measured(name, method, request, until))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            outcome = await asyncio.shield(task)
            if isinstance(outcome, Refusal):
                await context.abort(getattr(grpc.StatusCode, outcome.status), outcome.text)
            return outcome

        return serve

    async def _measured(self, name: str, method: Method, request: Any, until: Until) -> Any:
        began = time.monotonic()
        with self._metrics.under_way.track_inprogress():
            outcome = await _outcome(name, method, request, until)
        self._metrics.call_seconds.labels(name).observe(time.monotonic() - began)
        self._metrics.calls.labels(name, outcome.status if isinstance(outcome, Refusal) else "OK").inc()
        return outcome


@dataclass(frozen=True, slots=True)
class Refusal:
    """A gRPC status by its name, and what to say."""

    status: str
    text: str


async def _outcome(name: str, method: Method, request: Any, until: Until) -> Any:
    """The answer, or a Refusal. Raises nothing, since nobody may be there any more to take it."""
    try:
        return await method(request, until)
    except HeliosError as error:
        refusal = Refusal(status_of(error), str(error).replace("\n", " "))
        log.info("refused", extra={"call": name, "status": refusal.status, "reason": refusal.text})
        return refusal
    except Exception:
        log.exception("a call failed", extra={"call": name})
        return Refusal("INTERNAL", f"{name} failed; the driver's log says why")
