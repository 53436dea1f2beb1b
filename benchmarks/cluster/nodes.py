"""Nodes with GPUs and a disk that holds models, and how long a replica takes to start on one.

A cold start, as docs/performance.md has it measured: Helios' own share (0.23 s, "Cold starts"), vLLM until it listens
without its weights (35 s: 30 to 40 on a quiet machine), and the weights: from a node's disk at 2 GB/s ("Loaders": a GB
in 0.49 s through the mount, cold), over 10 Gbit/s at 0.98 of the link (cold_link). A pod gets 5 s more until its
process runs. The page cache never has a model: that is the slow case.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from benchmarks.cluster.traffic import ModelSpec

POD_S, OWN_S, ENGINE_S = 5.0, 0.23, 35.0
DISK_B_S: Final = 2.0e9
LINK_B_S: Final = 1.25e9 * 0.98
DISK_BYTES: Final = 1.0e12
GPUS: Final = 8


def start_s(spec: ModelSpec, cached: bool) -> float:
    """Seconds until a replica is ready."""
    return POD_S + OWN_S + ENGINE_S + spec.size / (DISK_B_S if cached else LINK_B_S)


class Node:
    """GPUs, and the models on its disk, the least recently used first."""

    def __init__(self) -> None:
        self.free = GPUS
        self.models: OrderedDict[str, float] = OrderedDict()
        self.held = 0.0
        """Bytes on its disk."""

    def fetch(self, spec: ModelSpec) -> None:
        """The model is on its disk from now on."""
        if spec.name in self.models:
            self.models.move_to_end(spec.name)
            return
        while self.held + spec.size > DISK_BYTES:
            self.held -= self.models.popitem(last=False)[1]
        self.models[spec.name] = spec.size
        self.held += spec.size


class Nodes:
    """All of them. Replicas go where the model is, else where most GPUs are free."""

    def __init__(self, count: int) -> None:
        self.all = [Node() for _ in range(count)]
        self.fetched = 0.0
        """Bytes that came over links."""

    def place(self, spec: ModelSpec) -> tuple[Node, bool] | None:
        """A node with GPUs that are now taken, and whether the model was there; None: no node has as many."""
        best: Node | None = None
        best_key = (False, -1)
        for node in self.all:
            if node.free >= spec.gpus and (key := (spec.name in node.models, node.free)) > best_key:
                best, best_key = node, key
        if best is None:
            return None
        best.free -= spec.gpus
        if not best_key[0]:
            self.fetched += spec.size
        best.fetch(spec)
        return best, best_key[0]

    def prefetch(self, spec: ModelSpec, count: int) -> None:
        """See to it that so many nodes that have GPUs for it have the model."""
        able = [node for node in self.all if node.free >= spec.gpus]
        missing = count - sum(spec.name in node.models for node in able)
        if missing <= 0:
            return
        for node in sorted(able, key=lambda one: -one.free):
            if missing <= 0:
                return
            if spec.name not in node.models:
                node.fetch(spec)
                self.fetched += spec.size
                missing -= 1
