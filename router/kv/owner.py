"""The one owner of the index: follows the workers that publish, and answers the data processes.

What is asked with known tokens is answered in the same step. Else a worker tokenizes first, for as long as a request
waits; the answer that comes later is kept for the next request with this prompt, whichever process it comes to.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from helios.config import KvEventsSettings
from router.kv.dialogue import Answer, Question, encode, questions
from router.kv.feeds import Feeds
from router.kv.index import Bounds, KvIndex
from router.kv.link import Link
from router.kv.publishers import Publisher, apart, publishers_of
from router.kv.tokens import WorkerTokenizer
from router.worker_keys import WorkerKeys
from router.workers import Workers

if TYPE_CHECKING:
    from helios.metrics import RouterMetrics

log = logging.getLogger("helios.router")

MOST: Final = 1024
"""Most questions that wait for tokens."""
UNREAD: Final = 8 << 20
"""Bytes that a process leaves unread, beyond which its answers are dropped: they would be late."""


class Owner:
    """The index of one router. ``running`` owns the sockets and the tasks."""

    def __init__(
        self, settings: KvEventsSettings, workers: Workers, metrics: RouterMetrics, tls: ssl.SSLContext,
        keys: WorkerKeys,
    ) -> None:  # fmt: skip
        """``tls``: how workers with https are met, which are asked for tokens; ``keys``: theirs."""
        self._settings, self._workers, self._keys = settings, workers, keys
        self.index = KvIndex(Bounds(settings.max_blocks_per_rank, settings.max_blocks))
        self.feeds = Feeds(self.index, metrics)
        self._tokenizer = WorkerTokenizer(
            self._where, budget_s=settings.wait_s, most_bytes=settings.tokens_mib << 20, tls=tls, headers=self._headers
        )
        self._turns = count()
        self._shared: dict[str, tuple[str, str]] = {}
        """Places that are said of two workers."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[_Link] = set()
        self._running = False

    @asynccontextmanager
    async def running(self, sock: socket.socket) -> AsyncIterator[None]:
        """Follow and answer while the context lasts; ``sock`` is where the processes ask, and is closed."""
        async with AsyncExitStack() as parts:
            parts.enter_context(self.feeds.running())
            await parts.enter_async_context(self._tokenizer.running())
            server = await asyncio.get_running_loop().create_unix_server(lambda: _Link(self), sock=sock)
            self._running = True
            self.refresh()
            try:
                yield
            finally:
                self._running = False
                server.close()
                for link in list(self._links):
                    link.close()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    def refresh(self) -> None:
        """The set of workers may be another: follow those that publish, and no others."""
        if not self._running:
            return
        wanted: list[Publisher] = []
        for worker in self._workers.all:
            wanted += publishers_of(worker.url, worker.kv, self._settings)
        publishers, shared = apart(wanted)
        for endpoint in shared.keys() - self._shared.keys():
            log.warning(
                "two workers are said to publish KV events at one place, so neither is followed there",
                extra={"endpoint": endpoint, "workers": shared[endpoint]},
            )
        self._shared = shared
        self.feeds.set(publishers)

    def described(self) -> dict[str, Any]:
        """What the administration shows of it."""
        publishers = self.feeds.described()
        return {
            "blocks": self.index.held,
            "max_blocks": self._settings.max_blocks,
            "publishers": publishers,
            "shared": sorted(self._shared),
        }

    def answer(self, question: Question, tokens: bytes) -> Answer:
        """How much of the prompt the workers of the model have."""
        urls = [worker.url for worker in self._workers.of(question.model)]
        followed = self.feeds.followed
        cached = {url: 0 for url in urls if url in followed}
        cached |= self.index.score(tokens, urls, question.adapter, question.salt)
        return Answer(question.number, len(tokens) // 4, cached)

    # --- for links -----------------------------------------------------------------------------------------------

    def joined(self, link: _Link) -> None:
        self._links.add(link)

    def left(self, link: _Link) -> None:
        self._links.discard(link)

    def asked(self, question: Question, link: _Link) -> None:
        tokens = question.tokens or self._tokenizer.known(question.model, question.text)
        if tokens is not None:
            link.answer(self.answer(question, tokens))
        elif len(self._tasks) >= MOST:
            link.answer(Answer(question.number))
        else:
            task = asyncio.get_running_loop().create_task(self._tokenize(question, link))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tokenize(self, question: Question, link: _Link) -> None:
        tokens = await self._tokenizer.encode(question.model, question.text)
        link.answer(Answer(question.number) if tokens is None else self.answer(question, tokens))

    def _where(self, model: str) -> str | None:
        """A worker to ask about tokens, each in its turn."""
        candidates = self._workers.candidates(model, ())
        return candidates[next(self._turns) % len(candidates)].url if candidates else None

    def _headers(self, url: str) -> Mapping[str, str]:
        worker = self._workers.at(url)
        return {} if worker is None else self._keys.headers(worker)


class _Link(Link[Question]):
    """A connection of a data process."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(questions(), UNREAD, "a process asked the index of KV events what is no question")
        self._owner = owner

    def answer(self, answer: Answer) -> None:
        """Tell it, unless it is gone or reads nothing."""
        if self.able:
            self.send(encode(answer))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        credentials = transport.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        if struct.unpack("3i", credentials)[1] != os.getuid():  # the socket's name is no secret
            log.warning("somebody else asked the index of KV events")
            self.close()
            return
        self._owner.joined(self)

    def came(self, found: list[Question]) -> None:
        for question in found:
            self._owner.asked(question, self)

    def ended(self) -> None:
        self._owner.left(self)
