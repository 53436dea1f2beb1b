"""Asks each worker for its ``/metrics`` every few seconds, while somebody reads them: a policy, or who looks at the
demand."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import aiohttp

from helios.http.bodies import within
from router.per_worker import watching
from router.worker import Worker
from router.worker_keys import WorkerKeys
from router.worker_metrics import WorkerMetrics, parse
from router.worker_session import worker_session
from router.workers import Workers

log = logging.getLogger("helios.router")

METRICS_MAX: Final = 4 << 20
"""Longest answer that is read, in bytes: vLLM's is about 100 KB."""
STALE: Final = 3
"""A reading counts for so many intervals."""
CONNECTIONS: Final = 64
"""Workers that are asked at a time."""


class Scraper:
    """Readings of all workers; ``running`` owns the tasks. Times are in seconds, ``now`` is the router's clock."""

    def __init__(
        self, workers: Workers, interval_s: float, now: Callable[[], float], tls: ssl.SSLContext,
        keys: WorkerKeys, read: Callable[[Worker], None], wanted: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        """``tls``: how workers with https are met; ``read`` hears of a worker that has a new reading; ``wanted``:
        whether anybody reads them now."""
        self._wanted = wanted
        self._tls, self._keys, self._read = tls, keys, read
        self._workers, self._interval_s, self._now = workers, interval_s, now
        self._silent: set[Worker] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask while the context lasts."""
        session = worker_session(self._tls, self._interval_s * STALE, CONNECTIONS)

        async def watch(worker: Worker) -> None:
            try:
                while True:
                    if self._wanted():
                        await self.read(worker, session)
                    await asyncio.sleep(self._interval_s)
            finally:
                self._silent.discard(worker)

        async with session, watching(self._workers, watch):
            yield

    async def read(self, worker: Worker, session: aiohttp.ClientSession) -> None:
        """One reading. One that fails changes nothing: the last grows old."""
        asked, sent = self._now(), worker.in_flight
        try:
            metrics = await self._ask(worker, session, asked, sent)
            reason = "there are no series of vLLM in it" if metrics is None else ""
        except (TimeoutError, aiohttp.ClientError) as error:
            metrics, reason = None, str(error) or type(error).__name__
        if metrics is not None:
            worker.metrics = metrics.since(worker.metrics)
            self._silent.discard(worker)
            self._read(worker)
        elif worker not in self._silent and worker.up:
            self._silent.add(worker)
            log.warning("a worker's metrics can't be read", extra={"worker": worker.url, "reason": reason})

    async def _ask(
        self, worker: Worker, session: aiohttp.ClientSession, asked: float, sent: int
    ) -> WorkerMetrics | None:
        headers = self._keys.headers(worker)
        async with session.get(f"{worker.url}/metrics", headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                raise aiohttp.ClientError(f"/metrics answered {response.status}")
            content = await within(response.content, METRICS_MAX)
        if content is None:
            raise aiohttp.ClientError(f"/metrics is longer than {METRICS_MAX >> 20} MiB")
        return parse(content, asked, sent)
