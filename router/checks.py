"""Active health checks: one task for each worker asks ``/health`` and reports to its state machine.

A worker that comes up is also asked for its ``/v1/models``: the entries go into the router's own list, and a worker
that does not serve a model under the configured name is named in the log, since it would answer 404 to every
request.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec

from router.relay.upstream import describe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from router.workers import Worker, Workers

log = logging.getLogger("helios.router")

MODELS_MAX: Final = 1 << 20
"""Longest ``/v1/models`` answer that is read, in bytes."""


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


class Checks:
    """The checks of all workers; ``running`` owns their tasks. Times are in seconds."""

    def __init__(self, workers: Workers, interval_s: float, timeout_s: float) -> None:
        self._workers, self._interval_s, self._timeout_s = workers, interval_s, timeout_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Check while the context lasts."""
        # A new connection each time: whether the worker accepts one is a part of the question.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
        )
        async with session, asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._watch(worker, session)) for worker in self._workers.all]
            yield
            for task in tasks:
                task.cancel()

    async def _watch(self, worker: Worker, session: aiohttp.ClientSession) -> None:
        while True:
            await self.check(worker, session)
            await asyncio.sleep(worker.health.next_check_s(self._interval_s))

    async def check(self, worker: Worker, session: aiohttp.ClientSession) -> None:
        """One check and its consequences."""
        failure = await self._ask_health(worker, session)
        if failure is not None:
            if worker.health.failed(failure):
                log.warning("a worker is down", extra={"worker": worker.url, "reason": failure})
        elif worker.health.succeeded():
            log.info("a worker is up", extra={"worker": worker.url, "models": worker.models})
            await self._ask_models(worker, session)

    async def _ask_health(self, worker: Worker, session: aiohttp.ClientSession) -> str | None:
        """Why the worker is not healthy, or None."""
        try:
            async with session.get(f"{worker.url}/health", allow_redirects=False) as response:
                return None if response.status == 200 else f"/health answered {response.status}"
        except TimeoutError:
            return f"/health gave no answer within {self._timeout_s:g} s"
        except aiohttp.ClientError as error:
            return describe(error)

    async def _ask_models(self, worker: Worker, session: aiohttp.ClientSession) -> None:
        try:
            async with session.get(f"{worker.url}/v1/models", allow_redirects=False) as response:
                content = await response.content.read(MODELS_MAX)
                status = response.status
            cards = msgspec.json.decode(content, type=_Models).data if status == 200 else None
        except (TimeoutError, aiohttp.ClientError, msgspec.DecodeError) as error:
            log.info("a worker's models can't be listed", extra={"worker": worker.url, "reason": str(error)})
            return
        if cards is None:  # 401 where the worker wants a key, which only clients have
            log.info("a worker's models can't be listed", extra={"worker": worker.url, "status": status})
            return
        worker.cards = {card["id"]: card for card in cards if isinstance(card.get("id"), str)}
        if missing := [model for model in worker.models if model not in worker.cards]:
            log.warning(
                "a worker does not serve a model under its configured name",
                extra={"worker": worker.url, "configured": missing, "serves": sorted(worker.cards)},
            )
