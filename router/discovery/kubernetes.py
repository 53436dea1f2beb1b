"""Workers in Kubernetes: EndpointSlices and pods by label, listed and watched with the official client.

The client's asyncio half (``kubernetes.aio``) knows how to reach a cluster: service account, kubeconfig, TLS, tokens
that are renewed. Its models are not used: they would hold up the event loop for each page; ``objects`` has the fields
that count.

One task for each type of objects lists, then watches from the list's version. What can go wrong, and what is done:

- A watch ends (the server ends it after ``watch_s``, a connection breaks): it goes on from the last version known.
- It is silent, or drips: nothing for ``silence_s``, where the server owes a bookmark each minute, or no end long after
  ``watch_s``. The connection is dropped, and the next watch goes on from the same version, so nothing is lost.
- 410 Gone: everything is listed anew.
- A server that answers and leaves changes out: everything is listed anew each ``relist_s`` in any case.
- Anything else: listed anew over new connections with credentials read anew, after a growing wait with jitter.

As long as the server can't be reached, what was known counts. It needs ``list`` and ``watch`` on ``pods`` and on
``endpointslices`` in ``discovery.k8s.io``, in one namespace, and nothing else.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec

from helios.cluster import cluster_client, require_client
from helios.config import KubernetesSettings
from helios.decoding import from_json
from helios.errors import HeliosError, IntegrityError, UsageError
from router.discovery.endpoints import workers_of
from router.discovery.objects import EndpointSlice, Pod, Status
from router.discovery.reflector import Gone, Lines, Reflector, refusal
from router.discovery.source import Teller

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient

SETTLE_S: Final = 0.2
"""Changes within this time are told as one: a rollout makes hundreds."""
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

Call = Callable[..., Awaitable[aiohttp.ClientResponse]]


class KubernetesSource:
    """The workers of one namespace. Raises UsageError where nothing is selected or the client is not installed."""

    def __init__(
        self,
        settings: KubernetesSettings,
        teller: Teller,
        *,
        clock: Callable[[], float] = time.monotonic,
        backoff_s: tuple[float, float] = BACKOFF_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        if not settings.slices and not settings.pods:
            raise UsageError("router.discovery.kubernetes needs slices, pods, or both: label selectors of workers")
        require_client("workers in Kubernetes need")
        self._settings, self._teller, self._clock = settings, teller, clock
        self._backoff_s, self._settle_s = backoff_s, settle_s
        self._slices = Reflector(EndpointSlice) if settings.slices else None
        self._pods = Reflector(Pod) if settings.pods else None
        self._dirty = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            if self._slices is not None:
                tasks.create_task(self._follow(self._slices, _slices, self._settings.slices))
            if self._pods is not None:
                tasks.create_task(self._follow(self._pods, _pods, self._settings.pods))
            tasks.create_task(self._tell())

    async def _tell(self) -> None:
        """Tell what is known, once it is whole, and whenever it has changed."""
        while True:
            await self._dirty.wait()
            await asyncio.sleep(self._settle_s)
            self._dirty.clear()
            if all(one.listed for one in (self._slices, self._pods) if one is not None):
                slices = None if self._slices is None else self._slices.objects.values()
                pods = None if self._pods is None else self._pods.objects.values()
                self._teller.knows(workers_of(slices, pods, self._settings.port))

    async def _follow(self, known: Reflector[Any], call_of: Callable[[ApiClient], Call], selector: str) -> None:
        """Keep ``known`` as the server has it, for ever."""
        waits = _Waits(*self._backoff_s)
        while True:
            try:
                async with self._client() as (client, namespace):
                    api = _Api(call_of(client), namespace, selector)
                    while True:
                        await self._list(api, known)
                        waits.reset()
                        try:
                            await self._watch(api, known)
                        except Gone as error:
                            self._teller.failed("gone", error.message)
                            await waits.wait()
            except _FAILURES as error:
                self._teller.failed("list" if not known.listed else "connection", _why(error))
            await waits.wait()

    async def _list(self, api: _Api, known: Reflector[Any]) -> None:
        known.begin()
        token: str | None = ""
        while token is not None:
            try:
                token = known.page(await api.page(token))
            except Gone:
                if not token:
                    raise
                token = ""  # the list's version is forgotten: it can't be read to its end
                known.begin()
        self._dirty.set()

    async def _watch(self, api: _Api, known: Reflector[Any]) -> None:
        """Watch again and again until it is time to list anew. Raises Gone, and what needs a new client."""
        waits = _Waits(*self._backoff_s)
        relist_at = self._clock() + self._settings.relist_s
        while (left := relist_at - self._clock()) > 0:
            version, lines, began = known.version, Lines(), self._clock()
            changes = api.changes(version, min(left, self._settings.watch_s), self._settings.silence_s)
            try:
                async with aclosing(changes):
                    async for piece in changes:
                        for line in lines.feed(piece):
                            if known.event(line):
                                self._dirty.set()
                        self._teller.heard()
            except TimeoutError:
                self._teller.failed("silent", f"a watch said nothing for {self._settings.silence_s:g} s")
                continue
            except aiohttp.ClientError as error:
                self._teller.failed("watch", _why(error))
            if known.version == version and self._clock() - began < self._backoff_s[0]:
                await waits.wait()
            else:
                waits.reset()

    def _client(self) -> AbstractAsyncContextManager[tuple[ApiClient, str]]:
        """A client with credentials as they are now, and the namespace."""
        settings = self._settings
        return cluster_client(kubeconfig=settings.kubeconfig, context=settings.context, namespace=settings.namespace)


class _Api:
    """Lists and watches of one type of objects."""

    def __init__(self, call: Call, namespace: str, selector: str) -> None:
        self._call, self._namespace, self._selector = call, namespace, selector

    async def page(self, token: str) -> bytes:
        """A page of a list; ``token``: which, the first if empty. Raises Gone, Refused and what aiohttp raises."""
        options: dict[str, Any] = {"_continue": token} if token else {}
        timeout = aiohttp.ClientTimeout(total=LIST_S, sock_connect=CONNECT_S)
        content = bytearray()
        async with await self._ask(timeout, limit=PAGE, **options) as answer:
            async for piece in answer.content.iter_any():
                content += piece
                if len(content) > MAX_PAGE:
                    raise IntegrityError(f"a page of a list has more than {MAX_PAGE >> 20} MiB")
        return bytes(content)

    async def changes(self, version: str, seconds: float, silence_s: float) -> AsyncGenerator[bytes, None]:
        """A watch from a version, which ends after ``seconds``; raises TimeoutError when it is silent or does not."""
        whole = max(1, int(seconds))
        timeout = aiohttp.ClientTimeout(total=whole + silence_s, sock_connect=CONNECT_S, sock_read=silence_s)
        answer = await self._ask(
            timeout, watch=True, allow_watch_bookmarks=True, resource_version=version, timeout_seconds=whole
        )  # fmt: skip
        async with answer:
            async for piece in answer.content.iter_any():
                yield piece

    async def _ask(self, timeout: aiohttp.ClientTimeout, **options: Any) -> aiohttp.ClientResponse:
        answer = await self._call(
            self._namespace, label_selector=self._selector, _preload_content=False, _request_timeout=timeout, **options
        )
        if answer.status == 200:
            return answer
        async with answer:
            content = await answer.content.read(1 << 16)
        try:
            status = from_json(content, Status)
        except msgspec.DecodeError:
            status = Status()
        raise refusal(Status(answer.status, status.reason, status.message or answer.reason or ""))


def _slices(client: ApiClient) -> Call:
    from kubernetes.aio.client import DiscoveryV1Api

    call: Call = DiscoveryV1Api(client).list_namespaced_endpoint_slice
    return call


def _pods(client: ApiClient) -> Call:
    from kubernetes.aio.client import CoreV1Api

    call: Call = CoreV1Api(client).list_namespaced_pod
    return call


class _Waits:
    """Waits that double from failure to failure, each with jitter so that routers don't come back together."""

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._most_s = most_s

    def reset(self) -> None:
        self._next_s = self._first_s

    async def wait(self) -> None:
        seconds, self._next_s = self._next_s, min(self._next_s * 2, self._most_s)
        await asyncio.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311


def _why(error: BaseException) -> str:
    if isinstance(error, HeliosError):
        return error.message
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
