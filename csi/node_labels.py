"""Labels on the node that say which models its cache has (``csi.node_labels``; helios/node_labels.py has the keys).

The mount is asked now and then what is here, and the node is told what has changed, and nothing else of it. Which of
our labels it has is read when the driver starts, so what an earlier process left there goes, and again every quarter of
an hour and after every failure. Neither a mount nor an API server that is away changes anything: it is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, Protocol

import msgspec

from csi.calls import Calls
from helios.decoding import converted
from helios.errors import HeliosError, Unavailable
from helios.metrics import CsiMetrics
from helios.names import RepoId
from helios.node_labels import PART, PREFIX, WHOLE, cached_key

log = logging.getLogger("csi.node_labels")

MOST: Final = 64
"""Labels on a node: the models used last. An object is at most some 1.5 MB in etcd, and every kubelet watches its
node."""
EVERY_S: Final = 30.0
"""How often the mount is asked, and at most the node is changed, in seconds."""
LOOK_S: Final = 900.0
"""How often it is looked whether somebody else changed our labels, in seconds."""
MOST_S: Final = 480.0
"""Longest pause after failures, in seconds; it doubles until then."""
ASK_S: Final = 20.0
"""Longest wait for the mount, in seconds."""
TRY_S: Final = 30.0
"""Longest time for reading and changing the node, in seconds."""


class Held(msgspec.Struct, frozen=True):
    """What a mount says of a commit (``GET /api/v1/models``); fields that are not needed are passed over."""

    repo: str
    commit: str
    weights: str
    idle_s: float | None = None


class _Models(msgspec.Struct, frozen=True):
    models: list[Held]


class Mount(Protocol):
    """The mount of this node (csi/mounted.py); it blocks."""

    def call(self, method: str, path: str, *, timeout_s: float) -> object: ...


class Nodes(Protocol):
    """What is asked of the API server (csi/api_server.py); it blocks."""

    def labels(self, node: str) -> dict[str, str]: ...
    def set_labels(self, node: str, changes: Mapping[str, str | None]) -> dict[str, str]: ...


def wanted(models: Iterable[Held], most: int = MOST) -> dict[str, str]:
    """The labels that a node with these commits has: at most ``most``, of those used last. Raises InvalidInput."""
    here = [each for each in models if each.weights in (WHOLE, PART)]
    here.sort(key=lambda each: (each.idle_s is None, each.idle_s or 0.0, each.repo, each.commit))
    return {cached_key(RepoId.from_canonical(each.repo), each.commit): each.weights for each in here[:most]}


def ours(labels: Mapping[str, str]) -> dict[str, str]:
    """Those of a node's labels that are of this kind."""
    return {key: value for key, value in labels.items() if key.startswith(PREFIX)}


def changes(present: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str | None]:
    """What has to be set (a value) and removed (None) so that of our labels the node has these."""
    stale: dict[str, str | None] = dict.fromkeys(sorted(ours(present).keys() - labels.keys()))
    return stale | {key: value for key, value in sorted(labels.items()) if present.get(key) != value}


class NodeLabels:
    """Keeps one node's labels. ``step`` is called by one task; ``clock`` gives seconds."""

    def __init__(
        self,
        mount: Mount,
        nodes: Nodes,
        calls: Calls,
        node: str,
        metrics: CsiMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mount, self._nodes, self._calls, self._node = mount, nodes, calls, node
        self._metrics, self._clock = metrics, clock
        self._present: dict[str, str] | None = None
        self._looked = 0.0
        self._said = ""

    async def step(self) -> None:
        """Have the node say what the mount has now. Raises HeliosError when that can't be."""
        answer = await self._calls.run("asking what is cached", self._ask, ASK_S + 1)
        labels = wanted(answer)
        if self._present is not None and self._clock() - self._looked >= LOOK_S:
            self._present = None
        known, self._present = self._present, None  # not known any more if this fails half way
        self._present = await self._calls.run("labelling the node", lambda: self._write(known, labels), TRY_S)
        if known is None:
            self._looked = self._clock()
        self._metrics.node_labels.set(len(self._present))

    async def run(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Until cancelled."""
        pause = EVERY_S
        while True:
            try:
                await self.step()
                pause, self._said = EVERY_S, ""
            except HeliosError as error:
                self._metrics.node_label_failures.inc()
                pause = min(MOST_S, 2 * pause)
                problem = str(error).replace("\n", " ")
                if problem != self._said:
                    log.warning("the node's labels stay as they are", extra={"node": self._node, "reason": problem})
                self._said = problem
            await sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - so that nodes don't ask in step

    # --- inside; these block ---

    def _ask(self) -> list[Held]:
        try:
            return converted(self._mount.call("GET", "models", timeout_s=ASK_S), _Models).models
        except msgspec.ValidationError as error:
            raise Unavailable(f"what the mount says of its models is not understood: {error}") from None

    def _write(self, known: Mapping[str, str] | None, labels: Mapping[str, str]) -> dict[str, str]:
        present = ours(self._nodes.labels(self._node)) if known is None else known
        missing = changes(present, labels)
        if not missing:
            return dict(present)
        after = ours(self._nodes.set_labels(self._node, missing))
        log.info("the node's labels have changed", extra={"node": self._node, "set": len(after)})
        return after
