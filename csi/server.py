"""The driver's process: the socket first, then everything that may take a while."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from csi import csi_pb2 as messages
from csi import provisioned
from csi.api_server import ApiServer
from csi.calls import Calls
from csi.controller import Controller, keep_renewed
from csi.health import Health
from csi.identity import Identity
from csi.mounted import MountOfNode
from csi.node import Volumes, keep_swept, recover
from csi.node_labels import NodeLabels
from csi.node_service import NodeService
from csi.registry import Registry
from csi.rights import Rights
from csi.untaint import keep_untainted
from csi.wire import Work
from helios.config import Config, CsiSettings
from helios.errors import Conflict, UsageError
from helios.home import Home
from helios.http.hosts import split_listen
from helios.metrics import CsiMetrics
from helios.rpc.health import HealthService

if TYPE_CHECKING:
    from helios.http.front import Front

log = logging.getLogger("csi")

MAX_CALLS: Final = 256
"""Calls that are answered at a time; more are RESOURCE_EXHAUSTED."""
GRACE_S: Final = 10.0
"""How long calls under way may go on after SIGTERM, in seconds."""
MAX_DEADLINE_S: Final = 600.0
NAME: Final = re.compile(r"[a-zA-Z](?:[a-zA-Z0-9._-]{0,61}[a-zA-Z])?\Z")
"""A driver's name, as CSI 1.12 wants it."""
TAINT: Final = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?\Z"
)
"""A taint's key, as Kubernetes wants it."""
MAX_SOCKET: Final = 107
"""Longest path of a unix socket, in bytes."""

Upkeep = Callable[[], Coroutine[Any, Any, None]]
"""Something that is done beside answering calls."""


def socket_of(endpoint: str) -> Path:
    """The socket's path in ``unix:///path`` (``unix:/path``, ``/path``). Raises UsageError."""
    path = endpoint
    for prefix in ("unix://", "unix:"):
        if endpoint.startswith(prefix):
            path = endpoint.removeprefix(prefix)
            break
    if not path.startswith("/") or len(os.fsencode(path)) > MAX_SOCKET:
        raise UsageError(f"--endpoint {endpoint!r} is no unix socket: unix:///PATH, at most {MAX_SOCKET} bytes of path")
    return Path(path)


def run(
    config: Config, home: Home, endpoint: str, ready: Callable[[], None], *, node_id: str | None, controller: bool
) -> int:
    """Serve until SIGTERM or SIGINT; ``ready`` is called when the socket answers. Returns the exit status.

    The Node service is served for ``node_id``, and not without; the Controller service if ``controller``. Raises
    UsageError, Conflict when somebody else serves there.
    """
    path = socket_of(endpoint)
    check(config.csi)
    asyncio.run(_serve(config, home, path, ready, node_id, controller))
    return 0


def check(settings: CsiSettings) -> None:
    """Raise UsageError for settings that can't be."""
    if not NAME.match(settings.driver):
        raise UsageError(f"csi.driver {settings.driver!r} is no driver's name: a domain of at most 63 characters is")
    if not provisioned.CLUSTER.match(settings.cluster):
        raise UsageError(f"csi.cluster {settings.cluster!r} is no name: use a-z, 0-9 and - (at most 63)")
    if not 0 < settings.deadline_s <= MAX_DEADLINE_S:
        raise UsageError(f"csi.deadline_s is {settings.deadline_s:g}; 0 to {MAX_DEADLINE_S:g} seconds are possible")
    if settings.listen:
        split_listen(settings.listen, "csi.listen")
    if settings.startup_taint and not TAINT.match(settings.startup_taint):
        raise UsageError(
            f"csi.startup_taint {settings.startup_taint!r} is no taint's key: prefix/name is, "
            "without a value or an effect"
        )
    if not settings.kubelet.startswith("/"):
        raise UsageError(f"csi.kubelet {settings.kubelet!r} is not an absolute path")


@dataclass(frozen=True, slots=True)
class Served:
    """The driver over HTTP."""

    front: Front
    socket: socket.socket
    url: str


async def _serve(
    config: Config, home: Home, path: Path, ready: Callable[[], None], node_id: str | None, controller: bool
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    settings, metrics = config.csi, CsiMetrics()
    calls, work = Calls(), Work(settings.deadline_s, metrics)
    health = Health(calls, recovering="" if node_id is None else "the mount of this node has not answered yet")
    mount = MountOfNode(home, Path(settings.mount) if settings.mount else None)
    volumes, registry = Volumes(mount, calls, Path(settings.kubelet)), Registry(config, home)
    _show(metrics, health, calls, volumes if node_id is not None else None)
    described = messages.DESCRIPTOR.services_by_name
    services = {"Identity": Identity(settings.driver, health, controller=controller).methods()}
    if node_id is not None:
        rights = Rights(registry, calls, metrics, settings.authorise, settings.audience)
        services["Node"] = NodeService(node_id, volumes, rights).methods()
    if controller:
        services["Controller"] = Controller(registry, calls, settings.cluster).methods()
    handlers = [work.handler(described[name], each) for name, each in services.items()]
    with contextlib.ExitStack() as stack:
        stack.callback(registry.close)
        stack.callback(mount.close)
        server: Any = grpc.aio.server(maximum_concurrent_rpcs=MAX_CALLS)
        server.add_generic_rpc_handlers((*handlers, HealthService(health).handler()))
        nodes = None if node_id is None else stack.enter_context(_api_server(settings))
        front = stack.enter_context(_front(settings, health, metrics))
        _make_room(path)
        if not server.add_insecure_port(f"unix:{path}"):
            raise UsageError(f"--endpoint: {path} can't be listened on")
        await server.start()
        url = None if front is None else front.url
        log.info("serving", extra={"socket": str(path), "driver": settings.driver, "node": node_id, "http": url})
        ready()
        upkeep = []
        if node_id is not None:
            others = [] if nodes is None else _at_api_server(nodes, node_id, mount, calls, metrics, settings)
            upkeep.append(_keep_node(volumes, health, metrics, others))
        if controller:
            upkeep.append(keep_renewed(registry, calls))
        tasks = [asyncio.create_task(each) for each in upkeep]
        serving = [] if front is None else [asyncio.create_task(front.front.serve(front.socket))]
        for task in (*tasks, *serving):
            task.add_done_callback(lambda _: stop.set())  # none of them ends by itself
        try:
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await server.stop(GRACE_S)
            await work.finish(GRACE_S)
            if front is not None:
                front.front.stop()
            ended = await asyncio.gather(*tasks, *serving, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome


async def _keep_node(volumes: Volumes, health: Health, metrics: CsiMetrics, others: Sequence[Upkeep]) -> None:
    """Recover, then sweep for ever, and do what else is to be done on a node that is ready."""
    await recover(volumes, health)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(keep_swept(volumes, metrics.swept.inc))
        for other in others:
            tasks.create_task(other())


@contextlib.contextmanager
def _api_server(settings: CsiSettings) -> Iterator[ApiServer | None]:
    """The cluster's API server, if something is to be changed there. Raises UsageError outside of a cluster."""
    if not settings.startup_taint and not settings.node_labels:
        yield None
        return
    with contextlib.closing(ApiServer(Path(settings.service_account), os.environ)) as nodes:
        yield nodes


def _at_api_server(
    nodes: ApiServer, node: str, mount: MountOfNode, calls: Calls, metrics: CsiMetrics, settings: CsiSettings
) -> list[Upkeep]:
    """What is done to the node's object."""

    async def untaint() -> None:
        await keep_untainted(nodes, calls, node, settings.driver, settings.startup_taint)
        metrics.tainted.set(0)

    metrics.tainted.set(bool(settings.startup_taint))
    upkeep: list[Upkeep] = [untaint] if settings.startup_taint else []
    if settings.node_labels:
        upkeep.append(NodeLabels(mount, nodes, calls, node, metrics).run)
    return upkeep


def _show(metrics: CsiMetrics, health: Health, calls: Calls, volumes: Volumes | None) -> None:
    """Have the figures read when they are asked for."""
    metrics.live.set_function(lambda: not health.unlive)
    metrics.ready.set_function(lambda: not health.unready)
    metrics.stuck.set_function(lambda: calls.stuck)
    if volumes is not None:
        metrics.published.set_function(volumes.places)


@contextlib.contextmanager
def _front(settings: CsiSettings, health: Health, metrics: CsiMetrics) -> Iterator[Served | None]:
    """What answers over HTTP, listening already, if ``csi.listen`` says so. Raises UsageError, Unavailable."""
    if not settings.listen:
        yield None
        return
    from helios.http.front import Front
    from helios.http.server import listen_tcp, url_of

    host, port = split_listen(settings.listen, "csi.listen")
    with contextlib.closing(listen_tcp(host, port, "csi.listen")) as sock:
        yield Served(Front(health, metrics), sock, url_of(sock, host))


def _make_room(path: Path) -> None:
    """Remove the socket of a process that is gone. Raises Conflict when it is not gone, UsageError."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ECONNREFUSED:
            raise UsageError(f"--endpoint: {path} can't be used: {error.strerror}") from None
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return
    raise Conflict(f"a driver serves at {path} already", hint="End it first, or take another --endpoint.")
