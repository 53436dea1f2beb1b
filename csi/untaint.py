"""Removing the node's startup taint (``csi.startup_taint``), once the driver is ready and the kubelet knows it.

A node that joins has no driver yet, and pods with volumes that are sent there early wait, or fail. So the node's group
gives it a taint, and the driver takes it away: this process, a child of the driver that ends with its work, because
the Kubernetes client needs some 110 MB.

The taint is removed with a JSON patch (RFC 6902) of its place in the list, guarded by a test that it is what was seen
there: whatever other taints come, go or change meanwhile survive, and a patch that does not fit any more is made anew
from what there is then. The API server applies all of a patch or nothing. It needs ``get`` and ``patch`` on ``nodes``,
and ``get`` on ``csinodes`` in ``storage.k8s.io``, whose entry is how the kubelet tells that it knows the driver.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from helios.cluster import cluster_client
from helios.decoding import from_json
from helios.errors import Conflict, Forbidden, HeliosError, NotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kubernetes.aio.client import ApiClient

log = logging.getLogger("csi.untaint")

DEADLINE_S: Final = 600.0
"""How long it is tried before that is an error, in seconds; the driver then begins anew."""
REQUEST_S: Final = 10.0
"""Longest wait for one answer of the API server, in seconds."""
PAUSES_S: Final = (0.5, 15.0)
"""First and longest pause between tries, in seconds."""
MAX_ANSWER: Final = 4 << 20
"""Longest answer that is read, in bytes: a node lists its images."""


class Nodes(Protocol):
    """What is asked of the API server. Calls raise NotFound, Forbidden, Conflict, Unavailable."""

    async def drivers(self, node: str) -> set[str]:
        """The CSI drivers that the node's kubelet knows."""

    async def taints(self, node: str) -> list[dict[str, Any]]:
        """The node's taints, in their order."""

    async def patch(self, node: str, operations: list[dict[str, Any]]) -> None:
        """Apply a JSON patch to the node: all of it, or Conflict."""


def removal(taints: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The JSON patch that removes the taints with this key, whatever their effect; from the last to the first, so that
    places of those which are still to be removed stay. Empty: there are none."""
    operations: list[dict[str, Any]] = []
    for place in reversed(range(len(taints))):
        if taints[place].get("key") == key:
            path = f"/spec/taints/{place}"
            operations.append({"op": "test", "path": path, "value": taints[place]})
            operations.append({"op": "remove", "path": path})
    return operations


async def remove(
    cluster: Callable[[], AbstractAsyncContextManager[Nodes]],
    node: str,
    driver: str,
    key: str,
    *,
    deadline_s: float = DEADLINE_S,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> bool:
    """Try until the taint is gone; whether there was one. ``cluster`` gives a client with credentials as they are now.

    Raises Unavailable, with what was wrong last, when that takes longer than the deadline.
    """
    pause, wrong = PAUSES_S[0], "the API server did not answer"
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    async with cluster() as nodes:
                        operations = removal(await nodes.taints(node), key)
                        if not operations:
                            return False
                        if driver in await nodes.drivers(node):
                            await nodes.patch(node, operations)
                            return True
                    problem = f"the kubelet does not know {driver} yet"
                except Conflict as error:
                    problem = error.message
                except HeliosError as error:
                    problem = str(error).replace("\n", " ")
                if problem != wrong:
                    log.info("the startup taint stays for now", extra={"node": node, "reason": problem})
                wrong = problem
                await sleep(pause * random.uniform(0.7, 1.3))  # noqa: S311 - so that nodes don't ask in step
                pause = min(PAUSES_S[1], 2 * pause)
    except TimeoutError:
        raise Unavailable(
            f"the taint {key} of the node {node} could not be removed within {deadline_s:g} s: {wrong}"
        ) from None


class _Taints(msgspec.Struct, frozen=True):
    taints: list[dict[str, Any]] | None = None


class _Node(msgspec.Struct, frozen=True):
    spec: _Taints = _Taints()


class _Driver(msgspec.Struct, frozen=True):
    name: str


class _Drivers(msgspec.Struct, frozen=True):
    drivers: list[_Driver] | None = None


class _CsiNode(msgspec.Struct, frozen=True):
    spec: _Drivers = _Drivers()


class _Status(msgspec.Struct, frozen=True):
    message: str = ""


class ApiNodes:
    """Nodes of a real cluster."""

    def __init__(self, client: ApiClient) -> None:
        from kubernetes.aio.client import CoreV1Api, StorageV1Api

        self._core, self._storage = CoreV1Api(client), StorageV1Api(client)

    async def drivers(self, node: str) -> set[str]:
        try:
            content = await _ask(f"reading the CSINode {node}", self._storage.read_csi_node, name=node)
        except NotFound:
            return set()  # the kubelet makes it with the first driver
        return {each.name for each in _decoded(content, _CsiNode).spec.drivers or []}

    async def taints(self, node: str) -> list[dict[str, Any]]:
        return (
            _decoded(await _ask(f"reading the node {node}", self._core.read_node, name=node), _Node).spec.taints or []
        )

    async def patch(self, node: str, operations: list[dict[str, Any]]) -> None:
        await _ask(f"removing a taint of the node {node}", self._core.patch_node, name=node, body=operations)


def _decoded(content: bytes, kind: type[Any]) -> Any:
    try:
        return from_json(content, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unavailable(f"the API server's answer can't be read: {error}") from None


async def _ask(what: str, call: Callable[..., Awaitable[Any]], **options: Any) -> bytes:
    """The body of an answer. Raises Conflict where what was to be changed is not as it was, NotFound, Forbidden,
    Unavailable."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    try:
        async with await call(**options, _preload_content=False, _request_timeout=timeout) as answer:
            content = bytearray()
            async for piece in answer.content.iter_any():
                content += piece
                if len(content) > MAX_ANSWER:
                    raise Unavailable(f"{what}: the answer has more than {MAX_ANSWER >> 20} MiB")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Unavailable(f"{what}: {error or type(error).__name__}") from None
    if answer.status < 300:
        return bytes(content)
    try:
        said = from_json(bytes(content), _Status).message or answer.reason
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = answer.reason
    problem = f"{what}: {answer.status}, {said}"
    if answer.status in (409, 422):  # 422: a test of the patch failed
        raise Conflict(problem)
    if answer.status == 404:
        raise NotFound(problem)
    if answer.status in (401, 403):
        hint = "The driver's service account needs get and patch on nodes, and get on csinodes.storage.k8s.io."
        raise Forbidden(problem, hint=hint)
    raise Unavailable(problem)


@asynccontextmanager
async def _cluster() -> AsyncIterator[Nodes]:
    async with cluster_client() as (client, _):
        yield ApiNodes(client)


def main(arguments: Sequence[str]) -> int:
    """``python -m csi.untaint NODE DRIVER KEY``: 0 when the node does not have the taint any more, else 1."""
    from helios import logs
    from helios.config import load_from_process

    logs.setup(load_from_process().log)
    node, driver, key = arguments
    try:
        removed = asyncio.run(remove(_cluster, node, driver, key))
    except HeliosError as error:
        log.error("the startup taint is still there", extra={"node": node, "taint": key, "reason": error.message})
        return 1
    log.info("no startup taint", extra={"node": node, "taint": key, "removed": removed})
    return 0


async def keep_untainted(node: str, driver: str, key: str) -> None:
    """Have a child do it, again whenever it could not; owns the child."""
    while True:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "csi.untaint",
            node,
            driver,
            key,
            stdin=asyncio.subprocess.DEVNULL,
            env=os.environ,
        )
        try:
            if await asyncio.wait_for(child.wait(), DEADLINE_S + 60) == 0:
                return
        except TimeoutError:
            log.error("the process that removes the startup taint hangs; it is ended", extra={"node": node})
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        await asyncio.sleep(PAUSES_S[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
