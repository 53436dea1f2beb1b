"""Asking a doubted worker for one token: what only its engine can answer.

``/health`` of vLLM is answered by the API server, which lives on when the engine behind it hangs. So a worker that is
doubted (``liveness``) is asked for a completion of one token; one that has no completions (embedding models) for an
embedding or a pooling. A worker so full that the question waits behind its queue is not hung: its counter of generated
tokens moves meanwhile. What can't be asked at all (401 without a key, 404) can't be found either, and is left alone.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import aiohttp

from helios.config import HangSettings
from helios.http.bodies import at_most
from helios.metrics import RouterMetrics
from router.descriptors import exhausted
from router.worker_keys import WorkerKeys
from router.worker_session import worker_session
from router.workers import Worker, Workers

log = logging.getLogger("helios.router")

LOOK_S: Final = 0.5
"""How often the workers are looked at."""
AT_A_TIME: Final = 16
"""Questions under way; more workers than these wait their turn."""
METRICS_MAX: Final = 4 << 20
"""Bytes of a worker's metrics that are read."""
METRICS_S: Final = 2.0
QUESTIONS: Final = (
    ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    ("/v1/embeddings", {"input": "a"}),
    ("/pooling", {"input": "a"}),
)
_COUNTERS: Final = re.compile(
    rb"^(?:vllm:generation_tokens_total|vllm:prompt_tokens_total)(?:\{[^\n]*\})? (\S+)", re.MULTILINE
)


class TokenChecks:
    """Looks for doubted workers and asks them. ``hung`` is told of each worker that is found."""

    def __init__(
        self, workers: Workers, settings: HangSettings, keys: WorkerKeys, metrics: RouterMetrics,
        hung: Callable[[Worker], None], tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        """``tls``: how workers with https are met; None: as the system's certificates say."""
        self._tls = tls
        self._workers, self._settings, self._metrics, self._hung = workers, settings, metrics, hung
        self._keys = keys
        self._slots = asyncio.Semaphore(AT_A_TIME)

    async def run(self) -> None:
        """Until cancelled."""
        session = worker_session(self._tls, self._settings.timeout_s)
        async with session, asyncio.TaskGroup() as group:
            while True:
                for worker in list(self._workers.all):
                    if worker.guard.life.look():
                        worker.guard.refresh()
                        group.create_task(self._check(worker, session))
                await asyncio.sleep(min(LOOK_S, self._settings.every_s))

    async def _check(self, worker: Worker, session: aiohttp.ClientSession) -> None:
        guard = worker.guard
        async with self._slots:
            result, reason = await self._ask(worker, session)
        self._metrics.token_checks.labels(worker.url, result).inc()
        if result != "failed":
            if guard.life.answered():
                log.info("a worker generates again", extra={"worker": worker.url})
        elif guard.life.silent(f"it answers, but {reason}"):
            log.warning("a worker hangs", extra={"worker": worker.url, "reason": reason})
            self._hung(worker)
        guard.refresh()

    async def _ask(self, worker: Worker, session: aiohttp.ClientSession) -> tuple[str, str]:
        """``ok``, ``failed`` and why, ``busy`` or ``unable``."""
        before = await self._tokens(worker, session)
        for path, question in QUESTIONS:
            body, headers = {"model": worker.models[0], **question}, self._keys.headers(worker)
            url = f"{worker.url}{path}"
            try:
                async with session.post(url, json=body, headers=headers, allow_redirects=False) as response:
                    await at_most(response.content, METRICS_MAX)
                    status = response.status
            except (TimeoutError, aiohttp.ClientError) as error:
                if exhausted(getattr(error, "os_error", error)):
                    log.warning("a worker can't be asked for a token: no file descriptor is left")
                    return "unable", ""
                after = await self._tokens(worker, session)
                if before is not None and after is not None and after > before:
                    return "busy", ""
                if isinstance(error, TimeoutError):
                    return "failed", f"gave no token within {self._settings.timeout_s:g} s"
                return "failed", "broke off when asked for a token"
            if status == 200:
                return "ok", ""
            if status >= 500 and status != 501:  # 501: vLLM, for what the model does not do
                return "failed", f"answered {status} when asked for a token"
            if status == 429:
                return "busy", ""
        log.info("a worker can't be asked for a token", extra={"worker": worker.url, "status": status})
        return "unable", ""

    async def _tokens(self, worker: Worker, session: aiohttp.ClientSession) -> float | None:
        """Tokens that the worker has taken in and made until now; None where it does not say."""
        with suppress(TimeoutError, aiohttp.ClientError, ValueError):
            timeout = aiohttp.ClientTimeout(total=min(METRICS_S, self._settings.timeout_s))
            headers = self._keys.headers(worker)
            async with session.get(
                f"{worker.url}/metrics", headers=headers, allow_redirects=False, timeout=timeout
            ) as response:
                content = await at_most(response.content, METRICS_MAX)
            if found := _COUNTERS.findall(content):
                return sum(float(value) for value in found)
        return None
