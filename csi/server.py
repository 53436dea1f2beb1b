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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc

from csi import csi_pb2 as messages
from csi import provisioned
from csi.calls import Calls
from csi.controller import Controller, keep_renewed
from csi.identity import Identity
from csi.mounted import MountOfNode
from csi.node import Volumes, keep_swept
from csi.node_service import NodeService
from csi.registry import Registry
from csi.rights import Rights
from csi.wire import Work
from helios.config import Config, CsiSettings
from helios.errors import Conflict, UsageError
from helios.home import Home

log = logging.getLogger("csi")

MAX_CALLS: Final = 256
"""Calls that are answered at a time; more are RESOURCE_EXHAUSTED."""
GRACE_S: Final = 10.0
"""How long calls under way may go on after SIGTERM, in seconds."""
MAX_DEADLINE_S: Final = 600.0
NAME: Final = re.compile(r"[a-zA-Z](?:[a-zA-Z0-9._-]{0,61}[a-zA-Z])?\Z")
"""A driver's name, as CSI 1.12 wants it."""
MAX_SOCKET: Final = 107
"""Longest path of a unix socket, in bytes."""


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
    if not settings.kubelet.startswith("/"):
        raise UsageError(f"csi.kubelet {settings.kubelet!r} is not an absolute path")


async def _serve(
    config: Config, home: Home, path: Path, ready: Callable[[], None], node_id: str | None, controller: bool
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    settings = config.csi
    calls, work = Calls(), Work(settings.deadline_s)
    mount = MountOfNode(home, Path(settings.mount) if settings.mount else None)
    volumes, registry = Volumes(mount, calls, Path(settings.kubelet)), Registry(config, home)
    described = messages.DESCRIPTOR.services_by_name
    services = {"Identity": Identity(settings.driver, calls, controller=controller).methods()}
    if node_id is not None:
        rights = Rights(registry, calls, asked=settings.authorise == "namespace")
        services["Node"] = NodeService(node_id, volumes, rights).methods()
    if controller:
        services["Controller"] = Controller(registry, calls, settings.cluster).methods()
    server: Any = grpc.aio.server(maximum_concurrent_rpcs=MAX_CALLS)
    server.add_generic_rpc_handlers(tuple(work.handler(described[name], each) for name, each in services.items()))
    _make_room(path)
    if not server.add_insecure_port(f"unix:{path}"):
        raise UsageError(f"--endpoint: {path} can't be listened on")
    await server.start()
    log.info("serving", extra={"socket": str(path), "driver": settings.driver, "node": node_id})
    ready()
    upkeep = [asyncio.create_task(keep_swept(volumes))] if node_id is not None else []
    upkeep += [asyncio.create_task(keep_renewed(registry, calls))] if controller else []
    try:
        await stop.wait()
    finally:
        for task in upkeep:
            task.cancel()
        await server.stop(GRACE_S)
        await work.finish(GRACE_S)
        await asyncio.gather(*upkeep, return_exceptions=True)
        mount.close()
        registry.close()


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
