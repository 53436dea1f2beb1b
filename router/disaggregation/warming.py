"""Has pairs of a prefill and a decode worker exchange blocks before clients' requests do (``pairs``), and learns who a
prefill worker is, where its connector wants that said to the other one beforehand (``peers``).

Each process of a router does so for itself: a pair that another one has warmed answers within milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Callable, Coroutine
from random import getrandbits
from typing import Any, Final

import aiohttp
import msgspec
from msgspec import Raw

from helios.decoding import json_decoder
from helios.http.bodies import at_most
from router.disaggregation.bodies import document_of
from router.disaggregation.bootstrap import query_url
from router.disaggregation.connectors import COMPLETIONS, Connector, Learns, Shape
from router.disaggregation.pairs import Pairs
from router.disaggregation.peers import Peers
from router.disaggregation.prefill import RANK
from router.disaggregation.transfer import Transfer
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
PATH: Final = COMPLETIONS
PROMPT: Final = "warm " * 64
IDENTITY: Final = b"warm-%016x"


Asking = Coroutine[Any, Any, bytes]


class _Answer(msgspec.Struct):
    kv_transfer_params: Raw = Raw(b"null")


_ANSWER: Final = json_decoder(_Answer)


class _Refused(Exception):
    """A worker doesn't do its part; why."""


class Warming:
    """``tls``: how workers with https are met; None: as the system's certificates say."""

    def __init__(
        self, pairs: Pairs, peers: Peers, workers: Workers, connector: Connector, keys: WorkerKeys,
        tls: ssl.SSLContext | None, counted: Callable[[float], None],
    ) -> None:  # fmt: skip
        """``counted`` is told how many pairs are warm."""
        self._pairs, self._peers, self._workers, self._connector = pairs, peers, workers, connector
        self._keys, self._tls, self._counted = keys, tls, counted
        self._slots = asyncio.Semaphore(AT_A_TIME)

    async def run(self) -> None:
        """Until cancelled; at once over where workers need no warming."""
        if not self._connector.handshake:
            return
        session = worker_session(self._tls, ANSWER_S)
        async with session, asyncio.TaskGroup() as group:
            while True:
                for prefill, decode, model in self._pairs.due(self._workers):
                    group.create_task(self._warm(prefill, decode, model, session))
                self._peers.keep({worker.url for worker in self._workers.all})
                self._counted(self._pairs.count)
                await asyncio.sleep(LOOK_S)

    async def _warm(self, prefill: Worker, decode: Worker, model: str, session: aiohttp.ClientSession) -> None:
        names = {"prefill": prefill.url, "decode": decode.url, "model": model}
        problem = ""
        async with self._slots:
            try:
                await self._exchange(prefill, decode, model, session)
            except _Refused as refused:
                problem = str(refused)
            except TimeoutError:
                problem = f"no answer within {ANSWER_S:g} s"
            except (aiohttp.ClientError, msgspec.DecodeError) as error:
                problem = type(error).__name__
        if problem:
            self._pairs.failed(prefill, decode)
            log.warning("a pair of workers exchanges no blocks", extra={"reason": problem, **names})
        else:
            self._pairs.done(prefill, decode)
            log.info("a pair of workers exchanges blocks", extra=names)

    async def _exchange(self, prefill: Worker, decode: Worker, model: str, session: aiohttp.ClientSession) -> None:
        """One short prompt. Raises _Refused, TimeoutError, aiohttp.ClientError, msgspec.DecodeError."""
        # An end of its own would be one without blocks (Connector.cut).
        own = {
            "model": self._workers.own_name(model), "prompt": PROMPT, "max_tokens": 1, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        document = document_of(json.dumps(own).encode())
        transfer = Transfer(PATH, document, self._connector, ANSWER_S, time.monotonic, getrandbits)
        if self._connector.learns is Learns.QUERY:
            await self._query(prefill, session)
        peer = {} if self._connector.learns is Learns.ANSWER else self._peers.of(prefill)
        if peer is None:
            raise _Refused("the prefill worker is not known")
        rank = peer.get("rank", b"")
        first = transfer.begin("", peer, IDENTITY % getrandbits(64))
        if self._connector.shape is Shape.CONCURRENT and self._connector.learns is not Learns.ANSWER:
            second = transfer.take(transfer.ticket, "")
            await self._both(
                self._ask("prefill", prefill, first, transfer.identity, session, rank),
                self._ask("decode", decode, second, transfer.identity, session),
            )
            return
        content = await self._ask("prefill", prefill, first, transfer.identity, session, rank)
        params = bytes(_ANSWER.decode(content).kv_transfer_params)
        if self._connector.answers and not params.startswith(b"{"):
            raise _Refused("the prefill worker answered 200 and no kv_transfer_params")
        if self._connector.learns is Learns.ANSWER:
            if not self._peers.answered(prefill, params):
                raise _Refused("the prefill worker doesn't say where it is met")
            transfer.meets(self._peers.of(prefill) or {})
        transfer.ready(params, None)
        await self._ask("decode", decode, transfer.take(transfer.ticket, ""), transfer.identity, session)

    async def _both(self, prefill: Asking, decode: Asking) -> None:
        """Both at once; where one fails the other is given up."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(prefill)
                group.create_task(decode)
        except* (_Refused, TimeoutError, aiohttp.ClientError) as several:
            raise several.exceptions[0] from None

    async def _query(self, prefill: Worker, session: aiohttp.ClientSession) -> None:
        """Ask Mooncake's bootstrap server which engines it has. No key of the worker's goes there."""
        async with session.get(f"{query_url(prefill)}/query", allow_redirects=False) as response:
            content = await at_most(response.content, ANSWER_MAX)
            if response.status != 200 or not self._peers.queried(prefill, content):
                raise _Refused(f"the prefill worker's bootstrap server answered {response.status} and no engine")

    async def _ask(
        self, role: str, worker: Worker, body: bytes, identity: bytes, session: aiohttp.ClientSession, rank: bytes = b""
    ) -> bytes:
        headers = {**self._keys.headers(worker), "content-type": "application/json"}
        if identity:
            headers["x-request-id"] = identity.decode()
        if rank:
            headers[RANK.decode()] = rank.decode()
        url = f"{worker.url}{PATH}"
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                raise _Refused(f"the {role} worker answered {response.status}")
            return await at_most(response.content, ANSWER_MAX)
