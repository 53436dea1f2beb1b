"""Asks the replicas of the router: each for its whole demand every few seconds, and for who waits without a pause.

A stream that says nothing for ``SILENT_S`` is made anew: routers say something every two seconds. When it says that
something has changed the whole is asked for as well, at once. A replica that can't be reached is asked again after a
growing wait, and is unknown meanwhile (``Collector``). Which replicas there are says ``Replicas``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final, Protocol
from urllib.parse import urlsplit

import aiohttp

from helios.demand import ALIVE_S, MAX_BYTES, MAX_LINE, read, read_line
from helios.errors import HeliosError, UsageError
from helios.http.bodies import within
from helios.kube.following import Waits, why
from helios.metrics import SignalsMetrics
from orchestrator.signals.collector import Collector

log = logging.getLogger("helios.operator")

SILENT_S: Final = 3 * ALIVE_S
"""A stream that says nothing for so long is given up, in seconds."""
BACKOFF_S: Final = (0.1, 5.0)
"""First and longest wait after a failure, in seconds."""
LEAST_S: Final = 0.1
"""Shortest time between two looks at a replica, in seconds."""
MOST: Final = 256
"""Replicas that are asked."""

_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, HeliosError, ValueError)


class Replicas(Protocol):
    """Knows which replicas there are."""

    async def follow(self, apply: Callable[[Collection[str]], None]) -> None:
        """Tell the URLs of their administrations, all of them, now and whenever they are others, until cancelled."""
        ...


class Together:
    """``Replicas`` of several that know some each. Nothing is told before all have: what is not asked seems to have
    nothing to do."""

    def __init__(self, ones: Sequence[Replicas]) -> None:
        self._ones = ones

    async def follow(self, apply: Callable[[Collection[str]], None]) -> None:
        known: dict[int, Collection[str]] = {}

        def tell(number: int, urls: Collection[str]) -> None:
            known[number] = urls
            if len(known) == len(self._ones):
                apply(sorted({url for told in known.values() for url in told}))

        async with asyncio.TaskGroup() as tasks:
            for number, one in enumerate(self._ones):
                tasks.create_task(one.follow(partial(tell, number)))


class Listed:
    """``Replicas`` that somebody has written down. Raises UsageError for what is no address."""

    def __init__(self, urls: Collection[str]) -> None:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise UsageError(f"operator.signals.routers: {url!r} is no address", hint="Write http://HOST:8481.")
        self._urls = [url.rstrip("/") for url in urls]

    async def follow(self, apply: Callable[[Collection[str]], None]) -> None:
        apply(self._urls)
        await asyncio.Event().wait()


class Routers:
    """``run`` asks them until it is cancelled. ``token``: gives the token as it is now; "": none is needed."""

    def __init__(
        self, replicas: Replicas, collector: Collector, token: Callable[[], str], metrics: SignalsMetrics, *,
        poll_s: float, timeout_s: float,
    ) -> None:  # fmt: skip
        self._replicas, self._collector, self._token, self._metrics = replicas, collector, token, metrics
        self._poll_s, self._timeout_s = poll_s, timeout_s
        self._asking: dict[str, asyncio.Task[None]] = {}
        metrics.replicas_unheard.set_function(lambda: len(collector.unheard))

    async def run(self) -> None:
        """Owns a task for each replica."""
        connector = aiohttp.TCPConnector(limit=2 * MOST, limit_per_host=0)
        session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        async with session, asyncio.TaskGroup() as tasks:

            def apply(urls: Collection[str]) -> None:
                known = sorted(set(urls))
                if len(known) > MOST:
                    log.error("too many routers; the others are not asked", extra={"routers": len(known), "most": MOST})
                self._collector.expect(known)
                for url in self._asking.keys() - set(known[:MOST]):
                    self._asking.pop(url).cancel()
                for url in known[:MOST]:
                    if url not in self._asking:
                        self._asking[url] = tasks.create_task(_Asking(self, session, url).run())
                self._metrics.replicas.set(len(known))

            await self._replicas.follow(apply)

    def headers(self) -> dict[str, str]:
        token = self._token()
        return {"authorization": f"Bearer {token}"} if token else {}

    @property
    def collector(self) -> Collector:
        return self._collector

    @property
    def metrics(self) -> SignalsMetrics:
        return self._metrics

    @property
    def times(self) -> tuple[float, float]:
        """Between two looks, and longest wait for an answer, in seconds."""
        return self._poll_s, self._timeout_s


class _Asking:
    """One replica."""

    def __init__(self, routers: Routers, session: aiohttp.ClientSession, url: str) -> None:
        self._routers, self._session, self._url = routers, session, url
        self._changed = asyncio.Event()
        self._well = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_again())
            tasks.create_task(self._watch_again())

    async def _look_again(self) -> None:
        poll_s, _ = self._routers.times
        waits = Waits(*BACKOFF_S)
        while True:
            self._changed.clear()
            try:
                await self._look()
            except _FAILURES as error:
                self._is(well=False, reason=why(error))
                await waits.wait()
                continue
            waits.reset()
            self._is(well=True)
            await asyncio.sleep(LEAST_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(poll_s):
                    await self._changed.wait()

    async def _look(self) -> None:
        async with asyncio.timeout(self._routers.times[1]):
            async with self._get("/demand") as answer:
                body = await _whole(answer)
        self._routers.collector.told(self._url, read(body))

    async def _watch_again(self) -> None:
        waits = Waits(*BACKOFF_S)
        while True:
            try:
                async for line in self._lines():
                    waits.reset()
                    if self._routers.collector.holds(self._url, read_line(line)):
                        self._changed.set()
                reason = "it ended"
            except _FAILURES as error:
                reason = why(error)
            self._routers.collector.silent(self._url)
            self._routers.metrics.watch_failures.inc()
            self._changed.set()
            log.debug("a router's stream has ended", extra={"router": self._url, "reason": reason})
            await waits.wait()

    async def _lines(self) -> AsyncIterator[bytes]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._routers.times[1], sock_read=SILENT_S)
        async with self._get("/demand/watch", timeout) as answer:
            if answer.status != 200:
                raise aiohttp.ClientError(f"it answered {answer.status}")
            left = b""
            async for piece in answer.content.iter_any():
                *lines, left = (left + piece).split(b"\n")
                if len(left) > MAX_LINE:
                    raise aiohttp.ClientError(f"a line is longer than {MAX_LINE >> 20} MiB")
                if lines:
                    yield lines[-1]  # those before it are over

    def _get(
        self, path: str, timeout: aiohttp.ClientTimeout | None = None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        timeout = timeout or aiohttp.ClientTimeout(total=self._routers.times[1])
        return self._session.get(
            f"{self._url}{path}", headers=self._routers.headers(), timeout=timeout, allow_redirects=False
        )

    def _is(self, *, well: bool, reason: str = "") -> None:
        if not well:
            self._routers.metrics.look_failures.inc()
        if well is not self._well:
            self._well = well
            if well:
                log.info("a router answers again", extra={"router": self._url})
            else:
                log.warning("a router's demand can't be read", extra={"router": self._url, "reason": reason})


async def _whole(answer: aiohttp.ClientResponse) -> bytes:
    content = await within(answer.content, MAX_BYTES)
    if content is None:
        raise aiohttp.ClientError(f"it is longer than {MAX_BYTES >> 20} MiB")
    if answer.status != 200:
        raise aiohttp.ClientError(f"it answered {answer.status}: {content[:200].decode(errors='replace')}")
    return content
