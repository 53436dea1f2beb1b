"""Removing the node's startup taint (``csi.startup_taint``), once the driver is ready and the kubelet knows it.

A node that joins has no driver yet, and pods with volumes that are sent there early wait, or fail. So the node's group
gives it a taint, and the driver takes it away.

The taint is removed with a JSON patch (RFC 6902) of its place in the list, guarded by a test that it is what was seen
there: whatever other taints come, go or change meanwhile survive, and a patch that does not fit any more is made anew
from what there is then. The API server applies all of a patch or nothing. It needs ``get`` and ``patch`` on ``nodes``,
and ``get`` on ``csinodes`` in ``storage.k8s.io``, whose entry is how the kubelet tells that it knows the driver.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

from csi.calls import Calls
from helios.errors import Conflict, HeliosError, Unavailable

log = logging.getLogger("csi.untaint")

DEADLINE_S: Final = 600.0
"""How long it is tried before that is an error, in seconds; then it is begun anew."""
TRY_S: Final = 40.0
"""Longest time for one try, in seconds: three answers of the API server."""
PAUSES_S: Final = (0.5, 15.0)
"""First and longest pause between tries, in seconds."""


class Nodes(Protocol):
    """What is asked of the API server (csi/api_server.py); it blocks."""

    def drivers(self, node: str) -> set[str]: ...
    def taints(self, node: str) -> list[dict[str, Any]]: ...
    def patch(self, node: str, operations: list[dict[str, Any]]) -> None: ...


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


def _try(nodes: Nodes, node: str, driver: str, key: str) -> bool:
    """Whether there was a taint, which is gone now. Blocks. Raises HeliosError while that can't be."""
    operations = removal(nodes.taints(node), key)
    if not operations:
        return False
    if driver not in nodes.drivers(node):
        raise Unavailable(f"the kubelet does not know {driver} yet")
    nodes.patch(node, operations)
    return True


async def remove(
    nodes: Nodes,
    calls: Calls,
    node: str,
    driver: str,
    key: str,
    *,
    deadline_s: float = DEADLINE_S,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> bool:
    """Try until the taint is gone; whether there was one.

    Raises Unavailable, with what was wrong last, when that takes longer than the deadline.
    """
    pause, wrong = PAUSES_S[0], "the API server did not answer"
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    return await calls.run("removing the taint", lambda: _try(nodes, node, driver, key), TRY_S)
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


async def keep_untainted(nodes: Nodes, calls: Calls, node: str, driver: str, key: str) -> None:
    """Have it removed, begun anew whenever that took too long."""
    while True:
        try:
            removed = await remove(nodes, calls, node, driver, key)
        except Unavailable as error:
            log.error("the startup taint is still there", extra={"node": node, "taint": key, "reason": error.message})
            continue
        log.info("no startup taint", extra={"node": node, "taint": key, "removed": removed})
        return
