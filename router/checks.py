"""Active health checks: one task for each worker asks ``/health`` and reports to its state machine.

A worker that joins is asked at once, one that drains no more.

A worker that comes up is also asked for its ``/v1/models``: the entries go into the router's own list, and a worker
that does not serve a model under the configured name is named in the log, since it would answer 404 to every
request.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec

from helios.decoding import from_json
from helios.http.bodies import at_most
from router.descriptors import OutOfDescriptors, exhausted
from router.health import State
from router.per_worker import watching
from router.relay.upstream import describe
from router.worker_session import worker_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from router.worker_keys import WorkerKeys
    from router.workers import Worker, Workers

log = logging.getLogger("helios.router")

MODELS_MAX: Final = 1 << 20
"""Longest ``/v1/models`` answer that is read, in bytes."""


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


class Checks:
    """The checks of all workers; ``running`` owns their tasks. Times are in seconds."""

    def __init__(
        self, workers: Workers, interval_s: float, timeout_s: float, tls: ssl.SSLContext,
        keys: WorkerKeys, decided: Callable[[Worker], None],
    ) -> None:  # fmt: skip
        """``tls``: how workers with https are met; ``decided`` hears of a worker that became up or down."""
        self._keys = keys
        self._workers, self._interval_s, self._timeout_s = workers, interval_s, timeout_s
        self._tls, self._decided = tls, decided

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Check while the context lasts."""
        session = worker_session(self._tls, self._timeout_s)
        async with session, watching(self._workers, lambda worker: self._watch(worker, session)):
            yield

    async def _watch(self, worker: Worker, session: aiohttp.ClientSession) -> None:
        while True:
            await self.check(worker, session)
            await asyncio.sleep(worker.health.next_check_s(self._interval_s))

    async def check(self, worker: Worker, session: aiohttp.ClientSession) -> None:
        """One check and its consequences."""
        try:
            failure = await self._ask_health(worker, session)
        except OutOfDescriptors:
            log.warning("a worker can't be checked: no file descriptor is left", extra={"worker": worker.url})
            return
        was_down = worker.health.state is State.DOWN
        if failure is not None:
            if worker.health.failed(failure):
                log.warning("a worker is down", extra={"worker": worker.url, "reason": failure})
                self._decided(worker)
        elif worker.health.succeeded():
            worker.begins_anew()
            self._workers.came_up(worker, was_down)
            log.info("a worker is up", extra={"worker": worker.url, "models": worker.models})
            self._decided(worker)
            if await self._ask_models(worker, session):
                self._decided(worker)

    async def _ask_health(self, worker: Worker, session: aiohttp.ClientSession) -> str | None:
        """Why the worker is not healthy, or None. Raises OutOfDescriptors: nothing is known of it."""
        try:
            async with self._get(worker, "/health", session) as response:
                return None if response.status == 200 else f"/health answered {response.status}"
        except TimeoutError:
            return f"/health gave no answer within {self._timeout_s:g} s"
        except aiohttp.ClientError as error:
            if exhausted(getattr(error, "os_error", error)):
                raise OutOfDescriptors from error
            return _why(error)

    def _get(
        self, worker: Worker, path: str, session: aiohttp.ClientSession
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return session.get(f"{worker.url}{path}", headers=self._keys.headers(worker), allow_redirects=False)

    async def _ask_models(self, worker: Worker, session: aiohttp.ClientSession) -> bool:
        """Whether the worker has said what it serves."""
        try:
            async with self._get(worker, "/v1/models", session) as response:
                content = await at_most(response.content, MODELS_MAX)
                status = response.status
            cards = from_json(content, _Models).data if status == 200 else None
        except (TimeoutError, aiohttp.ClientError, msgspec.DecodeError) as error:
            log.info("a worker's models can't be listed", extra={"worker": worker.url, "reason": str(error)})
            return False
        if cards is None:  # 401, say, where the worker wants a key and has none here
            log.info("a worker's models can't be listed", extra={"worker": worker.url, "status": status})
            return False
        worker.cards = {card["id"]: card for card in cards if isinstance(card.get("id"), str)}
        if missing := sorted(worker.names - worker.cards.keys()):
            log.warning(
                "a worker does not serve a model under its configured name",
                extra={"worker": worker.url, "configured": missing, "serves": sorted(worker.cards)},
            )
        return True


_TEXTS: Final[dict[type, str]] = {
    aiohttp.ConnectionTimeoutError: "no connection within the deadline",
    aiohttp.ClientConnectorDNSError: "its name can't be resolved",
    aiohttp.ServerDisconnectedError: "the connection was closed without an answer",
}


def _why(error: aiohttp.ClientError) -> str:
    """Why a check failed, without the address, which clients need not know."""
    cause = error.__cause__  # aiohttp's errors of TLS are made like ssl's, without what those say
    return next((_TEXTS[kind] for kind in type(error).__mro__ if kind in _TEXTS), None) or describe(
        cause if isinstance(cause, ssl.SSLError) else error
    )
