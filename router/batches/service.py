"""Files and batches put together, for one process of the router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.routing import Route

from helios.config import BatchSettings, RouterSettings
from helios.errors import UsageError
from helios.metrics import RouterMetrics
from router.admission.admission import Admission
from router.admission.rights import Right
from router.batches.api import Access
from router.batches.api_batches import Batches
from router.batches.api_files import Files
from router.batches.asking import Answer, ask
from router.batches.objects import check_store, open_objects
from router.batches.records import Who
from router.batches.run import Tools
from router.batches.runner import Runner
from router.batches.shelf import Shelf
from router.batches.slots import Slots
from router.batches.sweep import Sweep
from router.relay.relay import Relay
from router.routes import InferenceRoute
from router.workers import Workers


class BatchService:
    """``routes`` are the application's; ``running`` owns the rest. Raises UsageError."""

    def __init__(self, settings: RouterSettings, relay: Relay, metrics: RouterMetrics) -> None:
        ours = settings.batches
        check(ours)
        self._relay, self._admission = relay, relay.admission
        self._grace_s = settings.drain_s
        self._shelf = Shelf(open_objects(ours))
        room = Room(relay.workers, relay.admission, settings)
        tools = Tools(self._shelf, Slots(ours.in_flight, room), self._ask, settings, metrics)
        self._runner = Runner(tools)
        self._sweep = Sweep(self._shelf, ours.keep_days * 86400)
        access = Access(relay.admission)
        files = Files(self._shelf, access, settings, time.time)
        batches = Batches(self._shelf, files, access, ours, time.time, self._runner.wake)
        self.routes: list[Route] = [*files.routes, *batches.routes]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run batches while the context lasts. The relay runs longer."""
        sweeping = asyncio.create_task(self._sweep.run())
        try:
            async with self._runner.running(self._grace_s):
                yield
        finally:
            sweeping.cancel()
            await asyncio.wait({sweeping})
            self._shelf.close()

    def leave(self) -> None:
        """The process is about to end: begin nothing more."""
        self._runner.leave()

    async def _ask(self, who: Who, route: InferenceRoute, body: bytes, request_id: str) -> Answer:
        principal = None
        if self._admission is not None:
            rights = [Right(tuple(models), tuple(routes)) for models, routes in who.rights]
            principal = self._admission.on_behalf(who.tenant, who.key, rights)
        return await ask(self._relay, route, body, request_id, principal)


class Room:
    """Whether a request of a batch may begin: a worker of its model has little to do, and nobody waits for one.

    Where the queue holds others back (``queue.per_worker``), batches leave half of those places free.
    """

    def __init__(self, workers: Workers, admission: Admission | None, settings: RouterSettings) -> None:
        self._workers, self._admission = workers, admission
        held = settings.admission.queue.per_worker
        self._most = min(settings.batches.per_worker, max(1, held // 2)) if held else settings.batches.per_worker

    def __call__(self, model: str) -> bool:
        if self._admission is not None:
            model = self._admission.stands_for(model)
            if self._admission.waits(model):
                return False
        candidates = self._workers.candidates(model, ())
        # Where there is none the relay says why, or has the model woken.
        return not candidates or any(worker.in_flight < self._most for worker in candidates)


def check(settings: BatchSettings) -> None:
    """Raises UsageError for settings that can't work."""
    for name in (
        "max_file_mib", "max_files", "max_open", "max_lines", "keep_days", "in_flight", "per_worker", "lease_s",
        "poll_s",
    ):  # fmt: skip
        if getattr(settings, name) <= 0:
            raise UsageError(f"router.batches.{name} must be more than 0, not {getattr(settings, name)}")
    if settings.store:
        check_store(settings)
