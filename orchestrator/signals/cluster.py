"""What the cluster says: where the replicas of the router are, and who its front proxy is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Final

import aiohttp
import msgspec

from helios.decoding import from_json
from helios.errors import HeliosError, UsageError
from helios.http.bodies import at_most
from helios.http.hosts import bracketed
from helios.kube.calls import request
from helios.kube.endpoints import EndpointConditions, EndpointSlice
from helios.kube.following import Clients, Follower, Pace
from helios.kube.kinds import CONFIG_MAP, ENDPOINT_SLICE
from helios.kube.reflector import Reflector
from helios.kube.wire import Object
from orchestrator.signals.front_proxy import CONFIG_MAP as NAME
from orchestrator.signals.front_proxy import NAMESPACE, FrontProxy, of_config_map

log = logging.getLogger("helios.operator")

OF_SERVICE: Final = "kubernetes.io/service-name"
"""The label of a Service's EndpointSlices."""
SETTLE_S: Final = 0.2
"""Changes within so long are told as one, in seconds."""
TIMEOUT_S: Final = 10.0
MAX_BYTES: Final = 2 << 20


class _ConfigMap(Object, frozen=True):
    data: dict[str, str] | None = None


class Endpoints:
    """``Replicas`` behind a Service. ``clients``: of its namespace; ``service``: its name; ``port``: name or number."""

    def __init__(self, clients: Clients, service: str, port: str, pace: Pace | None = None) -> None:
        self._clients, self._service, self._port = clients, service, port
        self._pace = pace or Pace()

    async def follow(self, apply: Callable[[Collection[str]], None]) -> None:
        known: Reflector[EndpointSlice] = Reflector(partial(from_json, kind=EndpointSlice))
        dirty = asyncio.Event()
        follower = Follower(
            ENDPOINT_SLICE, known, self._clients, _Told(self._service), self._pace,
            selector=f"{OF_SERVICE}={self._service}", fresh=dirty.set,
        )  # fmt: skip
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follower.run())
            said: list[str] | None = None
            while True:
                await dirty.wait()
                await asyncio.sleep(SETTLE_S)
                dirty.clear()
                if known.listed and (now := urls_of(known.objects.values(), self._port)) != said:
                    said = now
                    apply(now)


class _Told:
    """Hears how the following goes."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._well = True

    def heard(self) -> None:
        self._well = True

    def failed(self, reason: str, why: str) -> None:
        if self._well:
            log.warning("routers can't be found", extra={"service": self._service, "reason": reason, "why": why})
        self._well = False


def urls_of(slices: Iterable[EndpointSlice], port: str) -> list[str]:
    """The addresses of those endpoints that answer, those included that end and still have requests; each pod once,
    by IPv4 where it has one. Sorted."""
    found: dict[str, tuple[str, str]] = {}
    for one in slices:
        number = _port(one, port)
        if number is None or one.address_type == "FQDN":
            continue
        for endpoint in one.endpoints or ():
            if not endpoint.addresses or not _answers(endpoint.conditions or EndpointConditions()):
                continue
            address, target = endpoint.addresses[0], endpoint.target_ref
            who = (target and (target.uid or target.name)) or address
            known = found.get(who)
            if known is None or (one.address_type, address) < known:
                found[who] = one.address_type, f"http://{bracketed(address)}:{number}"
    return sorted(url for _, url in found.values())


def _answers(conditions: EndpointConditions) -> bool:
    return conditions.ready is not False or bool(conditions.terminating and conditions.serving)


def _port(one: EndpointSlice, wanted: str) -> int | None:
    """By its name or number; a single port counts whatever it is called."""
    ports = [port for port in one.ports or () if port.port is not None]
    chosen = [port for port in ports if wanted in (port.name, str(port.port))] or (ports if len(ports) == 1 else [])
    return chosen[0].port if chosen else None


async def front_proxy(clients: Clients) -> FrontProxy:
    """Who it is, as the cluster says. Raises UsageError where it has none, and what ``request`` raises."""
    async with clients() as (client, _):
        path = CONFIG_MAP.path(NAMESPACE, NAME)
        async with await request(client, "GET", path, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as answer:
            body = await at_most(answer.content, MAX_BYTES)
    try:
        found: Any = from_json(body, _ConfigMap)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{NAMESPACE}/{NAME} can't be read: {error}") from None
    return of_config_map(found.data or {})


FAILURES: Final = (aiohttp.ClientError, TimeoutError, OSError, HeliosError)
"""What ``front_proxy`` may fail with while the cluster is away."""
