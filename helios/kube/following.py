"""Keeping what is known of one type of objects as the API server has it: lists and watches with the official client.

The client's asyncio half (``kubernetes.aio``) knows how to reach a cluster: service account, kubeconfig, TLS, tokens
that are renewed. Its models are not used: they would hold up the event loop for each page.

One task lists, then watches from the list's version. What can go wrong, and what is done:

- A watch ends (the server ends it after ``watch_s``, a connection breaks): it goes on from the last version known.
- It is silent, or drips: nothing for ``silence_s``, where the server owes a bookmark each minute, or no end long after
  ``watch_s``. The connection is dropped, and the next watch goes on from the same version, so nothing is lost.
- 410 Gone: everything is listed anew.
- A server that answers and leaves changes out: everything is listed anew each ``relist_s`` in any case.
- Anything else: listed anew over new connections with credentials read anew, after a growing wait with jitter.

As long as the server can't be reached, what was known counts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol

import aiohttp
import msgspec

from helios.errors import HeliosError, IntegrityError
from helios.http.bodies import within
from helios.kube.calls import Answer, request
from helios.kube.kinds import Kind
from helios.kube.reflector import Gone, Lines, Reflector, Refused, T

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient

LIST_S: Final = 30.0
"""Longest time for one page of a list, in seconds."""
PAGE: Final = 250
"""Objects in one page: a few hundred kilobytes, a millisecond or two to parse."""
MAX_PAGE: Final = 64 << 20
"""Longest page that is read, in bytes."""
CONNECT_S: Final = 10.0
BACKOFF_S: Final = (0.5, 30.0)
"""First and longest wait after a failure, in seconds."""

_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, HeliosError)

Clients = Callable[[], AbstractAsyncContextManager[tuple["ApiClient", str]]]
"""A client with credentials as they are now, and the namespace that is meant (``helios.cluster.cluster_client``)."""


class Told(Protocol):
    """Who hears how the following goes."""

    def heard(self) -> None:
        """The server answers, whether it says anything new or not."""

    def failed(self, reason: str, why: str) -> None:
        """``reason``: gone, list, connection, silent or watch; what was known counts."""


class Pace(msgspec.Struct, frozen=True):
    """Times, in seconds."""

    silence_s: float = 75.0
    """A watch that says nothing for so long is made anew."""
    watch_s: float = 240.0
    """How long one watch goes on."""
    relist_s: float = 600.0
    """How often everything is listed anew."""
    absent_s: float | None = None
    """How often is looked whether the server knows the type by now; None: it is an error if it doesn't."""
    backoff_s: tuple[float, float] = BACKOFF_S


class Follower(Generic[T]):
    """Keeps ``known`` as the server has it while ``run`` runs."""

    def __init__(
        self, kind: Kind, known: Reflector[T], clients: Clients, told: Told, pace: Pace, *, selector: str = "",
        everywhere: bool = False, fresh: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``everywhere``: in all namespaces, rather than in the one that is meant; ``fresh`` is called when ``known``
        may have changed."""
        self._kind, self._known, self._clients, self._told, self._pace = kind, known, clients, told, pace
        self._selector, self._everywhere, self._fresh, self._clock = selector, everywhere, fresh, clock

    async def run(self) -> None:
        """For ever."""
        waits, known = Waits(*self._pace.backoff_s), self._known
        while True:
            try:
                async with self._clients() as (client, namespace):
                    api = _Api(client, self._kind.path("" if self._everywhere else namespace), self._selector)
                    while True:
                        if not await self._listed(api):
                            await asyncio.sleep((self._pace.absent_s or 0) * random.uniform(0.7, 1.3))  # noqa: S311
                            continue
                        waits.reset()
                        try:
                            await self._watch(api)
                        except Gone as error:
                            self._told.failed("gone", error.message)
                            await waits.wait()
            except _FAILURES as error:
                self._told.failed("list" if not known.listed else "connection", why(error))
            await waits.wait()

    async def _listed(self, api: _Api) -> bool:
        """List all; whether the server knows the type."""
        self._known.begin()
        token: str | None = ""
        while token is not None:
            try:
                token = self._known.page(await api.page(token))
            except Gone:
                if not token:
                    raise
                token = ""  # the list's version is forgotten: it can't be read to its end
                self._known.begin()
            except Refused as error:
                if error.status != 404 or self._pace.absent_s is None:
                    raise
                self._known.absent()
                self._told.heard()
                self._fresh()
                return False
        self._told.heard()
        self._fresh()
        return True

    async def _watch(self, api: _Api) -> None:
        """Watch again and again until it is time to list anew. Raises Gone, and what needs a new client."""
        known, pace, waits = self._known, self._pace, Waits(*self._pace.backoff_s)
        relist_at = self._clock() + pace.relist_s
        while (left := relist_at - self._clock()) > 0:
            version, lines, began = known.version, Lines(), self._clock()
            changes = api.changes(version, min(left, pace.watch_s), pace.silence_s)
            try:
                async with aclosing(changes):
                    async for piece in changes:
                        for line in lines.feed(piece):
                            if known.event(line):
                                self._fresh()
                        self._told.heard()
            except TimeoutError:
                self._told.failed("silent", f"a watch said nothing for {pace.silence_s:g} s")
                continue
            except aiohttp.ClientError as error:
                self._told.failed("watch", why(error))
            if known.version == version and self._clock() - began < pace.backoff_s[0]:
                await waits.wait()
            else:
                waits.reset()


class _Api:
    """Lists and watches of one type of objects."""

    def __init__(self, client: ApiClient, path: str, selector: str) -> None:
        self._client, self._path, self._selector = client, path, selector

    async def page(self, token: str) -> bytes:
        """A page of a list; ``token``: which, the first if empty. Raises Gone, Refused and what aiohttp raises."""
        options: dict[str, Any] = {"continue": token} if token else {}
        timeout = aiohttp.ClientTimeout(total=LIST_S, sock_connect=CONNECT_S)
        async with await self._ask(timeout, limit=PAGE, **options) as answer:
            content = await within(answer.content, MAX_PAGE)
        if content is None:
            raise IntegrityError(f"a page of a list has more than {MAX_PAGE >> 20} MiB")
        return content

    async def changes(self, version: str, seconds: float, silence_s: float) -> AsyncGenerator[bytes, None]:
        """A watch from a version, which ends after ``seconds``; raises TimeoutError when it is silent or does not."""
        whole = max(1, int(seconds))
        timeout = aiohttp.ClientTimeout(total=whole + silence_s, sock_connect=CONNECT_S, sock_read=silence_s)
        answer = await self._ask(
            timeout, watch="true", allowWatchBookmarks="true", resourceVersion=version, timeoutSeconds=whole
        )  # fmt: skip
        async with answer:
            async for piece in answer.content.iter_any():
                yield piece

    async def _ask(self, timeout: aiohttp.ClientTimeout, **query: Any) -> Answer:
        if self._selector:
            query["labelSelector"] = self._selector
        return await request(self._client, "GET", self._path, query=query, timeout=timeout)


class Waits:
    """Waits that double from failure to failure, each with jitter so that many don't come back together."""

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._most_s = most_s

    def reset(self) -> None:
        self._next_s = self._first_s

    async def wait(self) -> None:
        seconds, self._next_s = self._next_s, min(self._next_s * 2, self._most_s)
        await asyncio.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311


def why(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, HeliosError):
        return error.message
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
