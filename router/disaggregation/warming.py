"""Has pairs of a prefill and a decode worker exchange blocks before clients' requests do (``pairs``).

Each process of a router does so for itself: a pair that another one has warmed answers within milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any, Final

import aiohttp
import msgspec

from helios.decoding import from_json, json_decoder
from router.disaggregation.connectors import Connector
from router.disaggregation.pairs import Pairs
from router.worker import Worker
from router.worker_keys import WorkerKeys
from router.worker_session import worker_session
from router.workers import Workers

log = logging.getLogger("helios.router")

LOOK_S: Final = 0.5
"""How often it is looked for new pairs, in seconds."""
AT_A_TIME: Final = 4
"""Pairs that are being warmed."""
ANSWER_S: Final = 30.0
"""Longest wait for an answer, in seconds; a handshake takes some."""
ANSWER_MAX: Final = 1 << 20
PATH: Final = "/v1/completions"
PROMPT: Final = "warm " * 64


class _Answer(msgspec.Struct):
    kv_transfer_params: dict[str, Any] | None = None


_ANSWER: Final = json_decoder(_Answer)


class Warming:
    """``tls``: how workers with https are met; None: as the system's certificates say."""

    def __init__(
        self, pairs: Pairs, workers: Workers, connector: Connector, keys: WorkerKeys, tls: ssl.SSLContext | None,
        counted: Callable[[float], None],
    ) -> None:  # fmt: skip
        """``counted`` is told how many pairs are warm."""
        self._pairs, self._workers, self._connector = pairs, workers, connector
        self._keys, self._tls, self._counted = keys, tls, counted
        self._slots = asyncio.Semaphore(AT_A_TIME)

    async def run(self) -> None:
        """Until cancelled."""
        session = worker_session(self._tls, ANSWER_S)
        async with session, asyncio.TaskGroup() as group:
            while True:
                for prefill, decode, model in self._pairs.due(self._workers):
                    group.create_task(self._warm(prefill, decode, model, session))
                self._counted(self._pairs.count)
                await asyncio.sleep(LOOK_S)

    async def _warm(self, prefill: Worker, decode: Worker, model: str, session: aiohttp.ClientSession) -> None:
        names = {"prefill": prefill.url, "decode": decode.url, "model": model}
        async with self._slots:
            problem = await self._exchange(prefill, decode, model, session)
        if problem:
            self._pairs.failed(prefill, decode)
            log.warning("a pair of workers exchanges no blocks", extra={"reason": problem, **names})
        else:
            self._pairs.done(prefill, decode)
            log.info("a pair of workers exchanges blocks", extra=names)

    async def _exchange(self, prefill: Worker, decode: Worker, model: str, session: aiohttp.ClientSession) -> str:
        """Why it failed; empty: it has not."""
        own = self._workers.own_name(model)
        body: dict[str, Any] = {"model": own, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        try:
            status, content = await self._ask(
                prefill, body | {"kv_transfer_params": from_json(self._connector.prefill, dict[str, Any])}, session
            )
            params = _ANSWER.decode(content).kv_transfer_params if status == 200 else None
            if params is None:
                return f"the prefill worker answered {status}" + (" and no kv_transfer_params" if status == 200 else "")
            status, _ = await self._ask(decode, body | {"kv_transfer_params": params}, session)
        except TimeoutError:
            return f"no answer within {ANSWER_S:g} s"
        except (aiohttp.ClientError, msgspec.DecodeError) as error:
            return type(error).__name__
        return "" if status == 200 else f"the decode worker answered {status}"

    async def _ask(self, worker: Worker, body: dict[str, Any], session: aiohttp.ClientSession) -> tuple[int, bytes]:
        headers = self._keys.headers(worker)
        async with session.post(f"{worker.url}{PATH}", json=body, headers=headers, allow_redirects=False) as response:
            return response.status, await response.content.read(ANSWER_MAX)
