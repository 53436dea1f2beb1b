"""Workers in Kubernetes: EndpointSlices, pods and Services by label, listed and watched with the official client.

How, and what happens when something goes wrong, is ``helios.kube.following``'s; the fields that count are ``objects``'.
It needs ``list`` and ``watch`` on ``pods``, ``services`` and on ``endpointslices`` in ``discovery.k8s.io``, in one
namespace, and nothing else. Services say which models there are while they sleep; where it may not look at them,
workers are found all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from helios.cluster import cluster_client, require_client
from helios.config import KubernetesSettings
from helios.errors import UsageError
from helios.kube.endpoints import EndpointSlice
from helios.kube.following import BACKOFF_S, Follower, Pace, Told
from helios.kube.kinds import ENDPOINT_SLICE, POD, SERVICE, Kind
from helios.kube.reflector import Reflector
from router.discovery.endpoints import asleep, workers_of
from router.discovery.objects import Pod, Service, decode
from router.discovery.source import Teller

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient

SETTLE_S: Final = 0.2
"""Changes within this time are told as one: a rollout makes hundreds."""


class _Seeking:
    """Hears how Services are followed: workers are told without them if they can't be looked at."""

    def __init__(self, teller: Teller, settled: Callable[[], None]) -> None:
        self._teller, self._settled = teller, settled
        self.in_vain = False

    def heard(self) -> None:
        self._teller.heard()

    def failed(self, reason: str, why: str) -> None:
        self.in_vain = True
        self._settled()
        self._teller.failed(reason, why)


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
        self._slices = Reflector(partial(decode, kind=EndpointSlice)) if settings.slices else None
        self._pods = Reflector(partial(decode, kind=Pod)) if settings.pods else None
        self._services = Reflector(partial(decode, kind=Service)) if settings.slices else None
        self._dirty = asyncio.Event()
        self._seeking = _Seeking(teller, self._dirty.set)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            if self._slices is not None:
                tasks.create_task(self._follow(self._slices, ENDPOINT_SLICE, self._settings.slices))
            if self._services is not None:  # a Service's labels are those of its slices
                tasks.create_task(self._follow(self._services, SERVICE, self._settings.slices, self._seeking))
            if self._pods is not None:
                tasks.create_task(self._follow(self._pods, POD, self._settings.pods))
            tasks.create_task(self._tell())

    async def _tell(self) -> None:
        """Tell what is known, once it is whole, and whenever it has changed."""
        while True:
            await self._dirty.wait()
            await asyncio.sleep(self._settle_s)
            self._dirty.clear()
            sought = self._services is None or self._services.listed or self._seeking.in_vain
            if sought and all(one.listed for one in (self._slices, self._pods) if one is not None):
                slices = None if self._slices is None else self._slices.objects.values()
                pods = None if self._pods is None else self._pods.objects.values()
                services = () if self._services is None else self._services.objects.values()
                self._teller.knows(workers_of(slices, pods, self._settings.port) + asleep(services))

    async def _follow(self, known: Reflector[Any], kind: Kind, selector: str, told: Told | None = None) -> None:
        """Keep ``known`` as the server has it, for ever."""
        settings = self._settings
        pace = Pace(settings.silence_s, settings.watch_s, settings.relist_s, backoff_s=self._backoff_s)
        await Follower(
            kind, known, self._client, told or self._teller, pace, selector=selector, fresh=self._dirty.set,
            clock=self._clock,
        ).run()  # fmt: skip

    def _client(self) -> AbstractAsyncContextManager[tuple[ApiClient, str]]:
        """A client with credentials as they are now, and the namespace."""
        settings = self._settings
        return cluster_client(kubeconfig=settings.kubeconfig, context=settings.context, namespace=settings.namespace)
